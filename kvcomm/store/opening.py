"""Stores by what a person writes: a URL or a kind with a size. Knows no more of a kind than how it is made.

memory:4G                                           this process's memory
disk:/path?bytes=20G                                a folder
redis://host:6379/0                                 Redis or Valkey; valkey://, and rediss:// or valkeys:// with TLS; unix:///path
    ?ttl=86400&timeout=0.5&chunk=1M&namespace=a     and the client's own options, as password=...
mooncake://host:50051?segment=256M                  Mooncake, by its master
    &host=10.0.0.7&namespace=a&timeout=2
Tiers on other machines come as `Guarded`, and take deadline=2 besides: seconds for a call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import parse_qsl, quote, urlencode

from kvcomm.errors import InputError
from kvcomm.store.guarded import Guarded
from kvcomm.store.records import RecordStore
from kvcomm.store.remote import RemoteStore, without_password

__all__ = ["nbytes_of", "open_remote", "open_store"]

FORMS = "memory:4G, disk:/path?bytes=20G, redis://host:6379/0, rediss://, valkey://, mooncake://host:50051?segment=256M"
REMOTE_FORMS = "redis://host:6379/0, rediss://, valkey://, mooncake://host:50051?segment=256M"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_REDIS = ("redis", "rediss", "valkey", "valkeys", "unix")

T = TypeVar("T")


def nbytes_of(text: str) -> int:
    """Bytes: digits, perhaps a fraction, and K, M, G or T, which are powers of 1024. Raises InputError."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.ASCII | re.IGNORECASE)
    if not found:
        raise InputError(f"{text!r} is no size; one is written as 4G, 256M or 1000000: K, M, G and T are powers of 1024")
    return int(float(found[1]) * _UNITS[found[2].upper()]) if "." in found[1] else int(found[1]) * _UNITS[found[2].upper()]


def open_store(text: str) -> RecordStore:
    """A new store, to be closed. A service is not asked yet. Raises InputError, which names no password."""
    kind, found, rest = text.partition(":")
    if found and kind == "memory":
        from kvcomm.store.slabs import SlabStore

        return SlabStore(nbytes_of(rest))
    if found and kind == "disk":
        return _disk(rest)
    if found and kind in (*_REDIS, "mooncake"):
        return open_remote(text)
    raise InputError(f"{without_password(text)!r} is no store; there are {FORMS}")


def open_remote(text: str) -> Guarded:
    """As `open_store`, of stores on other machines: they carry notes as well."""
    kind, found, _ = text.partition("://")
    if not found or kind not in (*_REDIS, "mooncake"):
        raise InputError(f"{without_password(text)!r} is no store on another machine; there are {REMOTE_FORMS}")
    options = _Options(text)
    deadline_s = options.take("deadline", _seconds, 2.0)
    inner = _mooncake(options) if kind == "mooncake" else _redis(options)
    return Guarded(inner, deadline_s=deadline_s)


class _Options:
    """What stands behind the question mark, taken one by one."""

    def __init__(self, text: str) -> None:
        self.place, found, query = text.partition("?")
        self.shown = without_password(text)
        self._left = dict(parse_qsl(query, keep_blank_values=True))
        if found and not self._left:
            raise InputError(f"{self.shown!r} has a question mark and no options behind it: name=value&...")

    def take(self, name: str, read: Callable[[str], T], default: T) -> T:
        if name not in self._left:
            return default
        value = self._left.pop(name)
        try:
            return read(value)
        except ValueError as e:
            why = f": {e}" if isinstance(e, InputError) else ""
            raise InputError(f"{self.shown!r} has {name}={value!r}, which cannot be read{why}") from None

    def rest(self) -> str:
        """All that was not taken, as it was written."""
        return f"{self.place}?{urlencode(self._left, quote_via=quote)}" if self._left else self.place

    def end(self, known: str) -> None:
        """Raise InputError for options that nobody took."""
        if self._left:
            raise InputError(f"{self.shown!r} has the option {next(iter(self._left))!r}; there are {known}")


def _disk(rest: str) -> RecordStore:
    from kvcomm.store.disk import DiskStore

    options = _Options(rest)
    limit = options.take("bytes", nbytes_of, -1)
    options.end("bytes")
    if not options.place or limit < 0:
        raise InputError(f"disk:{rest!s} has no folder or no limit; write disk:/path?bytes=20G")
    return DiskStore(options.place, limit)


def _redis(options: _Options) -> RemoteStore:
    from kvcomm.store.redis import CHUNK_BYTES, RedisStore

    ttl_s = options.take("ttl", int, 86_400)
    timeout_s = options.take("timeout", _seconds, 0.5)
    chunk = options.take("chunk", nbytes_of, CHUNK_BYTES)
    namespace = options.take("namespace", str, "")
    return RedisStore(options.rest(), ttl_s=ttl_s, timeout_s=timeout_s, chunk_bytes=chunk, namespace=namespace)


def _mooncake(options: _Options) -> RemoteStore:
    from kvcomm.store.mooncake import SEGMENT_BYTES, MooncakeStore

    segment = options.take("segment", nbytes_of, SEGMENT_BYTES)
    host = options.take("host", str, "") or None
    namespace = options.take("namespace", str, "")
    timeout_s = options.take("timeout", _seconds, 2.0)
    options.end("segment, host, namespace, timeout, deadline")
    master = options.place.removeprefix("mooncake://").rstrip("/")
    return MooncakeStore(master, segment_bytes=segment, host=host, namespace=namespace, timeout_s=timeout_s)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise InputError("seconds above 0 were expected")
    return value
