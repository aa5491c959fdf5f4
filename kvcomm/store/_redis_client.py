"""A client of one Redis or Valkey server that tries nothing twice, and its errors as faults with a name. Knows no records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from kvcomm.errors import InputError
from kvcomm.store.remote import RemoteFault, without_password

if TYPE_CHECKING:
    from redis import Redis

__all__ = ["Client"]

SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss", "unix": "unix"}
MISSING = "a Redis tier needs the package redis: pip install 'kvcomm[redis]'"


class Client:
    """`redis`, under `faults`: `with client.faults(): client.redis.get(...)`."""

    def __init__(self, url: str, *, timeout_s: float, connections: int) -> None:
        """Connects to nothing yet. Raises InputError for a URL that names no server, and where the package is missing."""
        try:
            from redis import BlockingConnectionPool, Redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise InputError(MISSING) from None
        target, secret = _checked(url)
        try:
            pool = BlockingConnectionPool.from_url(
                target,
                max_connections=connections,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                protocol=2,  # the pool looks for answers left over from an earlier call before it lends a connection
                decode_responses=False,
                socket_read_size=256 << 10,  # its 32 KiB take ten times as long
            )
        except (ValueError, TypeError):
            raise InputError(f"{without_password(url)!r} cannot be read: a host, a port and a database number?") from None
        self.place = without_password(url)
        self.redis: Redis = Redis(connection_pool=pool)
        self._secret = secret

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Whatever the client raises within, as RemoteFault."""
        from redis.exceptions import RedisError

        try:
            yield
        except (RedisError, OSError) as e:
            text = str(e)[:200]
            if self._secret:
                text = text.replace(self._secret, "***")
            raise RemoteFault("redis", _reason(e), f"{self.place}: {text or type(e).__name__}") from None

    def close(self) -> None:
        self.redis.close()
        self.redis.connection_pool.disconnect()


def _checked(url: str) -> tuple[str, str]:
    """The URL for the client, and the password in it."""
    shown = without_password(url)
    scheme, found, rest = url.partition("://")
    if not found or scheme not in SCHEMES:
        raise InputError(f"{shown!r} is no Redis URL; one begins with {'://, '.join(SCHEMES)}://")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise InputError(f"{shown!r} cannot be read: special characters of a password are written as %XX") from None
    options = parse_qsl(parts.query)
    for name, _ in options:
        if not name.startswith("ssl_") and name not in {"db", "username", "password"}:
            raise InputError(f"{shown!r} has the option {name!r}; db, username, password and ssl_... are known")
    secret = parts.password or dict(options).get("password") or ""
    return f"{SCHEMES[scheme]}://{rest}", unquote(secret)


def _reason(e: Exception) -> str:
    from redis import exceptions as of

    kinds: tuple[tuple[type[Exception], str], ...] = (  # the first that fits
        (of.TimeoutError, "timeout"),
        (of.AuthenticationError, "not-permitted"),
        (of.AuthorizationError, "not-permitted"),
        (of.NoPermissionError, "not-permitted"),
        (of.BusyLoadingError, "loading"),
        (of.ConnectionError, "unreachable"),
        (of.OutOfMemoryError, "store-full"),
        (of.ReadOnlyError, "read-only"),
        (TimeoutError, "timeout"),
        (OSError, "unreachable"),
    )
    if "NOAUTH" in str(e) or "WRONGPASS" in str(e):
        return "not-permitted"
    return next((reason for kind, reason in kinds if isinstance(e, kind)), "error")
