"""Where a server is: a Unix socket on this host, or host and port with TLS or, on a trusted network, without. And who is at the
other end of a Unix socket.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kvcomm.errors import InputError

__all__ = ["Address", "address_of", "default_path", "is_trusted", "other_end"]


@dataclass(frozen=True)
class Address:
    """Either a path, or host and port."""

    path: Path | None = None
    host: str = ""
    port: int = 0
    tls: bool = False

    @classmethod
    def parse(cls, text: str) -> Address:
        """`/run/kvcomm.sock`, `unix:/run/kvcomm.sock`, `tcp://host:port` or `tls://host:port`. Raises InputError."""
        if text.startswith(("tcp://", "tls://")):
            try:
                parts = urlsplit(text)
                host, port, rest = parts.hostname, parts.port, parts.path
            except ValueError:
                host, port, rest = None, None, ""
            if not host or not port or rest not in ("", "/"):
                raise InputError(f"address {text!r} has no host and port; write tls://host:port")
            return cls(host=host, port=port, tls=text.startswith("tls"))
        path = Path(text.removeprefix("unix:"))
        if "://" in text or not str(path).startswith("/"):
            raise InputError(
                f"address {text!r} is none; write an absolute path, unix:/path, tls://host:port or tcp://host:port"
            )
        if len(os.fsencode(path)) > 100:
            raise InputError(
                f"the socket's path {text!r} is longer than the 100 bytes that systems allow; choose a shorter one"
            )
        return cls(path=path)

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'tcp'}://{host}:{self.port}"


def address_of(text: str | None = None) -> Address:
    """What was asked for, else KVCOMM_SERVER of the environment, else the user's own place. Raises InputError."""
    text = text or os.environ.get("KVCOMM_SERVER")
    return Address.parse(text) if text else Address(path=default_path())


def default_path() -> Path:
    """The user's own place for the socket of this host's server."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "kvcomm.sock" if runtime else Path(tempfile.gettempdir()) / f"kvcomm-{os.getuid()}" / "server.sock"


def other_end(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end of a Unix socket; of who listens: when it began to."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid


def is_trusted(uid: int) -> bool:
    """Only with this user, or root, KV is shared over a socket: who could put a socket there could hand out any."""
    return uid in (os.getuid(), 0)
