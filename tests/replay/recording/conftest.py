"""A server of raw bytes to stand behind the pass-through, a client of raw bytes to stand before it, and files to read back.

Neither knows an HTTP library: what they saw is compared byte for byte, with the pass-through between them and without it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from kvcomm.replay.recording._proxy import serve
from kvcomm.replay.recording.recorder import Recorder

Play = Callable[["Seen", socket.socket], None]
PATIENCE_S = 30.0


@dataclass
class Seen:
    """A message as it came: of a request or of an answer."""

    start: str  # the first line
    headers: list[tuple[str, str]]
    body: bytes
    whole: bool  # it ended as its framing says

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]


def read(connection: socket.socket, *, head: bool = False) -> Seen:
    """One message, or what there is of it until the connection ends."""
    with connection.makefile("rb") as stream:
        return _read(stream, head=head)


def _read(stream: BinaryIO, *, head: bool) -> Seen:
    start = stream.readline().decode("latin-1").rstrip("\r\n")
    headers = []
    while (line := stream.readline().decode("latin-1").rstrip("\r\n")) != "":
        name, _, value = line.partition(":")
        headers.append((name, value.strip()))
    seen = Seen(start, headers, b"", whole=True)
    if start.startswith("HTTP/1.1 100"):
        return _read(stream, head=head)
    if head or start.split(" ")[1:2] in (["204"], ["304"]):
        return seen
    try:
        if seen.header("transfer-encoding"):
            while size := int(stream.readline().split(b";")[0] or b"-", 16):
                piece = stream.read(size)
                seen.body += piece
                stream.readline()
                if len(piece) < size:
                    seen.whole = False
                    return seen
            stream.readline()
        elif length := seen.header("content-length"):
            seen.body = stream.read(int(length[0]))
            seen.whole = len(seen.body) == int(length[0])
        elif start.startswith("HTTP/"):
            seen.body = stream.read()  # until the end of the connection
    except (ValueError, ConnectionError):
        seen.whole = False
    return seen


@dataclass
class Upstream:
    """Answers every request as `play` says, and keeps what it was asked."""

    play: Play
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(PATIENCE_S)
        self.listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(PATIENCE_S)
            request = read(connection)
            self.seen.append(request)
            self.play(request, connection)


def says(*pieces: bytes) -> Play:
    """Sends these and hangs up."""

    def play(request: Seen, connection: socket.socket) -> None:
        for piece in pieces:
            connection.sendall(piece)

    return play


def json_answer(body: object, status: str = "200 OK") -> Play:
    data = json.dumps(body).encode()
    return says(f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def stream_answer(*events: object) -> Play:
    """Server-sent events, each in a chunk of its own."""
    texts = [event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events]
    return says(SSE, *(chunk(f"data: {text}\n\n".encode()) for text in texts), b"0\r\n\r\n")


def request(path: str, body: object = None, *headers: str, method: str = "POST") -> bytes:
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    length = [f"Content-Length: {len(data)}"] if data else []
    lines = [f"{method} {path} HTTP/1.1", "Host: model.example", "Connection: close", *length, *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data


def ask(url: str, raw: bytes) -> Seen:
    """Send a request of raw bytes and read the answer."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(raw)
        return read(connection, head=raw.startswith(b"HEAD"))


@dataclass
class Running:
    """A pass-through at work."""

    url: str
    recorder: Recorder


@contextmanager
def passing_through(upstream: str, recorder: Recorder, session_header: str | None = None) -> Iterator[Running]:
    """Every call is written when it is left."""
    started = threading.Event()
    place: list[Any] = []

    async def main() -> None:
        stop = asyncio.Event()
        place.extend((asyncio.get_running_loop(), stop))

        def ready(port: int) -> None:
            place.append(port)
            started.set()

        await serve(
            upstream,
            recorder,
            host="127.0.0.1",
            port=0,
            session="default",
            session_header=session_header,
            stop=stop,
            ready=ready,
        )

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert started.wait(PATIENCE_S)
    loop, stop, port = place
    try:
        yield Running(f"http://127.0.0.1:{port}", recorder)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        recorder.close()


def spans(path: Path) -> list[dict[str, Any]]:
    """Every span of a file, its attributes as plain values; JSON inside them is read too."""
    found = []
    for line in path.read_bytes().splitlines():
        (resource,) = json.loads(line)["resourceSpans"]
        (scope,) = resource["scopeSpans"]
        (span,) = scope["spans"]
        values = {item["key"]: next(iter(item["value"].values())) for item in span["attributes"]}
        for name in ("system_instructions", "input.messages", "output.messages", "tool.definitions"):
            if f"gen_ai.{name}" in values:
                values[f"gen_ai.{name}"] = json.loads(values[f"gen_ai.{name}"])
        found.append({**span, "attributes": values})
    return found


class Wire:
    """Everything above, for tests to take as a fixture."""

    ask = staticmethod(ask)
    chunk = staticmethod(chunk)
    json_answer = staticmethod(json_answer)
    passing_through = staticmethod(passing_through)
    read = staticmethod(read)
    request = staticmethod(request)
    says = staticmethod(says)
    spans = staticmethod(spans)
    stream_answer = staticmethod(stream_answer)

    def __init__(self, file: Path) -> None:
        self.file = file
        self._upstreams: list[Upstream] = []

    def upstream(self, play: Play) -> Upstream:
        self._upstreams.append(Upstream(play))
        return self._upstreams[-1]

    def recorded(self, upstream: Upstream, raw: bytes, session_header: str | None = None) -> tuple[Seen, list[dict[str, Any]]]:
        """The answer to one request by way of the pass-through, and what was written."""
        with passing_through(upstream.url, Recorder(self.file), session_header) as running:
            answer = ask(running.url, raw)
        return answer, spans(self.file)

    def close(self) -> None:
        for upstream in self._upstreams:
            upstream.close()


@pytest.fixture
def wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Wire(tmp_path / "trace.jsonl")
    yield made
    made.close()
