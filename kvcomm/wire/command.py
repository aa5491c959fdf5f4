"""`kvcomm server`: owns the KV of a host until it is ended. `kvcomm server status`: what a running one says of itself."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import ipaddress
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from kvcomm.errors import InputError, KVCommError
from kvcomm.report import document, dumps, write_json
from kvcomm.store.eviction import Quotas
from kvcomm.store.opening import nbytes_of
from kvcomm.wire.address import Address, address_of
from kvcomm.wire.status import ask, lines
from kvcomm.wire.tokens import read_tokens
from kvcomm.wire.transport import Unreachable

if TYPE_CHECKING:
    from kvcomm.wire.tiers import Tiers

__all__ = ["add_arguments", "run"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm server`."""
    parser.add_argument("action", nargs="?", choices=("run", "status"), default="run", help="run one (default), or ask it")
    parser.add_argument("--socket", metavar="PATH", help="where it listens (default: KVCOMM_SERVER, else the user's own place)")
    tiers = parser.add_argument_group("what it keeps")
    tiers.add_argument("--memory", default="4G", metavar="BYTES", help="shared memory (default: 4G)")
    tiers.add_argument(
        "--disk", type=Path, metavar="DIR", help="a folder for what has to leave the memory, and for the next start"
    )
    tiers.add_argument("--disk-bytes", default="50G", metavar="BYTES", help="of that folder (default: 50G)")
    tiers.add_argument("--remote", metavar="URL", help="a service that hosts share: redis://host:port or mooncake://host:port")
    tiers.add_argument(
        "--write",
        choices=("through", "back"),
        default="through",
        help="to disk and remote before a client is answered, or after (default: through)",
    )
    tiers.add_argument(
        "--quota",
        action="append",
        default=[],
        metavar="TENANT=BYTES",
        help="of memory and of disk that a tenant may take; *=BYTES: each other one; may be repeated",
    )
    tiers.add_argument("--anchors-bytes", default="256M", metavar="BYTES", help="for anchors (default: 256M)")
    hosts = parser.add_argument_group("other hosts")
    hosts.add_argument(
        "--listen", action="append", default=[], metavar="ADDRESS", help="also listen at tls://host:port; may be repeated"
    )
    hosts.add_argument(
        "--token-file", type=Path, metavar="FILE", help="lines `tenant token`: what clients there must say, and status says"
    )
    hosts.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    hosts.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, where the certificate's file does not hold it")
    hosts.add_argument("--insecure", action="store_true", help="allow tcp:// for other hosts: KV and tokens in clear text")
    hosts.add_argument("--metrics-port", type=int, metavar="N", help="serve /metrics and /healthz; 0: a free port")
    hosts.add_argument("--metrics-host", default="127.0.0.1", metavar="HOST", help="where (default: 127.0.0.1)")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; or ask. Raises InputError for what cannot be served, Unreachable where none answers."""
    address = address_of(args.socket)
    if args.action == "status":
        return _status(args, address)
    if address.path is None:
        raise InputError(f"--socket is {address}; give a path, and {address} with --listen")
    level = logging.WARNING if args.quiet else logging.INFO
    logging.basicConfig(level=level, format="kvcomm: %(message)s", stream=sys.stderr)
    asyncio.run(_serve(args, [address, *_listen_at(args)]))
    return 0


def _status(args: argparse.Namespace, address: Address) -> int:
    try:
        status = ask(address, read_tokens(args.token_file))
    except Unreachable as fault:
        why = fault.__cause__ or fault.reason
        raise KVCommError(f"no server answers at {address} ({why}); start one: kvcomm server") from fault
    doc = document("kvcomm.server.status/1", address=str(address), **status)
    if args.output is not None:
        write_json(args.output / "server_status.json", doc)
    print(dumps(doc) if args.format == "json" else "\n".join(lines(address, status)))
    return 0


async def _serve(args: argparse.Namespace, addresses: Sequence[Address]) -> None:
    ended = _ended_by_signals()
    with _alone_at(addresses[0]):
        from kvcomm.wire.tiers import Settings, Tiers

        tokens, tls = read_tokens(args.token_file), _certificate(args)
        settings = Settings(
            nbytes_of(args.memory),
            args.disk,
            nbytes_of(args.disk_bytes),
            args.remote,
            args.write,
            _quotas(args.quota),
            nbytes_of(args.anchors_bytes),
        )
        metrics = None if args.metrics_port is None else (args.metrics_host, args.metrics_port)
        await _run(
            Tiers.open(settings), tokens, {address: tls if address.tls else None for address in addresses}, metrics, ended
        )


async def _run(
    tiers: Tiers,
    tokens: Mapping[str, str],
    addresses: Mapping[Address, ssl.SSLContext | None],
    metrics: tuple[str, int] | None,
    ended: asyncio.Event,
) -> None:
    from kvcomm.wire.metrics import Responder
    from kvcomm.wire.server import Server

    server, halted = Server(tiers.library, tokens, tiers.anchors), threading.Event()

    async def restore() -> None:
        try:
            count = await server.run(lambda: tiers.restore(halted))
            log.info("%d objects of the disk are known", count)
        except Exception:  # what is not known is computed
            log.exception("what the disk keeps is not known")

    responder, restoring = Responder(server.asked), None
    try:
        said = []
        for address, tls in addresses.items():
            await server.listen(address, tls)
            said.append(str(address))
        if metrics is not None:
            port = await responder.listen(*metrics)
            said.append(f"http://{metrics[0]}:{port}/metrics")
        if tiers.disk is not None:
            restoring = asyncio.create_task(restore())
        log.info("listening at %s", ", ".join(said))
        _notify("READY=1")
        await ended.wait()
        _notify("STOPPING=1")
    finally:
        halted.set()
        await responder.close()
        if restoring is not None:
            await restoring
        await server.close()


def _alone_at(address: Address) -> TextIO:
    """A lock beside the socket, held until it is closed: of two servers that start at once at one place, one does. Raises
    InputError for the other.
    """
    assert address.path is not None
    from kvcomm.wire.server import check_place

    check_place(address.path)
    lock = address.path.with_name(f"{address.path.name}.lock")
    try:
        lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "w")
    except OSError as fault:
        raise InputError(f"cannot listen at {address}: {fault}; choose another path with --socket") from fault
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as taken:
        file.close()
        raise InputError(f"{address} is another server's; stop it, or choose another path with --socket") from taken
    return file


def _ended_by_signals() -> asyncio.Event:
    ended, loop = asyncio.Event(), asyncio.get_running_loop()

    def end() -> None:
        ended.set()
        for number in SIGNALS:
            loop.remove_signal_handler(number)  # a second one does not wait

    for number in SIGNALS:
        loop.add_signal_handler(number, end)
    return ended


def _listen_at(args: argparse.Namespace) -> list[Address]:
    """Raises InputError for what is no address, and for one that would show KV and tokens to a network."""
    addresses = [Address.parse(text) for text in args.listen]
    for address in addresses:
        if address.path is None and not address.tls and not args.insecure and not _is_loopback(address.host):
            raise InputError(f"{address} would send KV and tokens in clear text; use tls://, or say --insecure")
        if address.path is None and args.token_file is None:
            raise InputError(f"{address} needs tokens; give --token-file, so that not everybody can read what is kept")
    return addresses


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _quotas(given: Sequence[str]) -> Quotas:
    quotas = {}
    for text in given:
        tenant, sign, nbytes = text.rpartition("=")
        if not sign:
            raise InputError(f"--quota is {text!r}; write TENANT=BYTES, for example alice=2G, or *=1G for each other one")
        quotas[tenant] = nbytes_of(nbytes)
    return Quotas(quotas.pop("*", None), quotas)


def _certificate(args: argparse.Namespace) -> ssl.SSLContext | None:
    if args.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(args.tls_cert, args.tls_key, password=lambda: "")  # nobody is here to be asked for one
    except OSError as fault:
        raise InputError(
            f"--tls-cert {args.tls_cert} with --tls-key {args.tls_key} cannot be used: {fault}; give PEM files, the key "
            "without a password"
        ) from fault
    return context


def _notify(state: str) -> None:
    """Tells systemd, where it started us and wants to know (Type=notify)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.sendto(state.encode(), f"\0{path[1:]}" if path.startswith("@") else path)
