"""Real services on loopback for tests: started, stopped, frozen, and a proxy that is slow on purpose."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

__all__ = ["MooncakeMaster", "Proxy", "RedisServer", "Service", "ended", "free_port"]

APT = "apt-get install -y redis-server"


def free_port() -> int:
    """Of 127.0.0.1, unused a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Service:
    """One process that answers on `port`. A context manager that ends it."""

    def __init__(self, argv: list[str], port: int, log: Path) -> None:
        self.argv, self.port, self.log = argv, port, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self.argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.log.parent)
        until = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                said = self.log.read_text(errors="replace")[-2000:]
                assert self._process.poll() is None, f"{self.argv[0]} ended with {self._process.returncode}: {said}"
                assert time.monotonic() < until, f"{self.argv[0]} does not answer on port {self.port}: {said}"
                time.sleep(0.02)  # nothing says when a port is open
            else:
                return

    def kill(self) -> None:
        """As kill -9, and gone when this returns."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It keeps its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class RedisServer(Service):
    """redis-server (or valkey-server) that keeps nothing on disk; more options as on its command line."""

    def __init__(self, folder: Path, *options: str) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        assert program, f"these tests need a Redis server. Install it as root: {APT}"
        port = free_port()
        argv = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "no"]
        super().__init__([*argv, *options], port, folder / f"redis-{port}.log")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


class MooncakeMaster(Service):
    """mooncake_master of this environment's package."""

    def __init__(self, folder: Path, *options: str) -> None:
        program = Path(sys.executable).parent / "mooncake_master"
        assert program.exists(), f"{program} is missing; install it: {sys.executable} -m pip install 'kvcomm[test]'"
        port = free_port()
        argv = [str(program), f"--rpc_port={port}", f"--metrics_port={free_port()}", "--rpc_address=127.0.0.1"]
        super().__init__([*argv, "--metrics_host=127.0.0.1", *options], port, folder / f"mooncake-{port}.log")

    @property
    def url(self) -> str:
        return f"mooncake://127.0.0.1:{self.port}"


class Proxy:
    """Passes TCP on to `port`; while `delay_s` is set, every piece of an answer waits so long. A context manager."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self.piece = 65536  # bytes of an answer passed on at once
        self._target = port
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for s in (self._listener, *self._open):
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                continue
            self._open += [here, there]
            threading.Thread(target=self._pass, args=(here, there, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(there, here, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        try:
            while data := source.recv(self.piece if answers else 65536):
                if answers and self.delay_s:
                    self._ended.wait(self.delay_s)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def ended(pid: int) -> bool:
    """Is there no such process any more?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
