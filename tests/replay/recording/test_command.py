"""`kvcomm record` as a person runs it: a process of its own, ended by a signal, killed, or refused."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvcomm.cli import main
from kvcomm.replay.readers import read_trace
from kvcomm.replay.recording.exchange import LIMIT
from kvcomm.replay.recording.names import SESSION_HEADERS

if TYPE_CHECKING:
    from tests.replay.recording.conftest import Seen, Wire

ASKED = {"model": "m", "messages": [{"role": "user", "content": "Who is alice?"}]}
SAID = {"choices": [{"message": {"role": "assistant", "content": "alice is here"}, "finish_reason": "stop"}]}


@contextmanager
def command(folder: Path, upstream: str, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the base_url that it tells; killed if it is still there in the end."""
    argv = [sys.executable, "-m", "kvcomm", "record", "--upstream", f"{upstream}/v1/", "--port", "0", "--output", "trace.jsonl"]
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with subprocess.Popen(
        [*argv, *flags], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline().startswith("recording to trace.jsonl until Ctrl-C; in place of ")
            url = process.stderr.readline().strip()
            assert url.endswith("/v1")
            yield process, url.removesuffix("/v1")
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_records_until_it_is_told_to_end(wire: Wire, tmp_path: Path, number: signal.Signals) -> None:
    upstream = wire.upstream(wire.json_answer(SAID))
    with command(tmp_path, upstream.url, "--format", "json", "--session", "mine") as (process, url):
        answer = wire.ask(url, wire.request("/v1/chat/completions", ASKED))
        assert json.loads(answer.body) == SAID
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    doc = json.loads(out)
    assert (doc["schema"], doc["calls"], doc["calls_lost"], doc["problems"]) == ("kvcomm.record/1", 1, 0, {})
    (call,) = read_trace(tmp_path / "trace.jsonl", strict=True)
    assert (call.session, call.agent, call.messages[0].content, call.output) == (
        "mine",
        "agent",
        "Who is alice?",
        "alice is here",
    )


def test_killed_in_the_middle_of_an_answer(wire: Wire, tmp_path: Path) -> None:
    """What had ended is in the file, which a second recorder goes on with."""

    def play(request: Seen, connection: socket.socket) -> None:
        if b'"stream"' not in request.body:
            return wire.json_answer(SAID)(request, connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + wire.chunk(b"data: 1\n\n"))
        connection.recv(1)
        return None

    upstream, file = wire.upstream(play), tmp_path / "trace.jsonl"
    for calls in (1, 2):
        with command(tmp_path, upstream.url) as (process, url):
            wire.ask(url, wire.request("/v1/chat/completions", ASKED))
            host, _, port = url.removeprefix("http://").partition(":")
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                connection.sendall(wire.request("/v1/chat/completions", {**ASKED, "stream": True}))
                got = b""
                while b"data: 1" not in got:
                    got += connection.recv(4096)
                while file.read_bytes().count(b"\n") < calls:
                    time.sleep(0.01)
                process.kill()
                process.wait(60)
    assert [call.output for call in read_trace(file, strict=True)] == ["alice is here"] * 2


@pytest.mark.parametrize("works", [True, False])
def test_a_redaction_beside_the_caller(wire: Wire, tmp_path: Path, works: bool) -> None:
    body = "return text.replace('alice', '[name]')" if works else "raise ValueError(text)"
    (tmp_path / "mine.py").write_text(f"def scrub(text):\n    {body}\n")
    with command(tmp_path, wire.upstream(wire.json_answer(SAID)).url, "--redact", "mine:scrub") as (process, url):
        for _ in range(2):
            assert json.loads(wire.ask(url, wire.request("/v1/chat/completions", ASKED)).body) == SAID
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert "alice" not in (tmp_path / "trace.jsonl").read_text() + out + err
    if works:
        assert (process.returncode, err, out) == (0, "", "2 calls written to trace.jsonl\n")
        assert [call.output for call in read_trace(tmp_path / "trace.jsonl")] == ["[name] is here"] * 2
    else:
        assert (process.returncode, err) == (1, "recording: the redaction failed: ValueError\n")
        assert out == "2 calls written to trace.jsonl, 2 of them without text; 0 lost\n  2 x the redaction failed: ValueError\n"
        assert len(wire.spans(tmp_path / "trace.jsonl")) == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--upstream", "model.example/v1"], "--upstream is model.example/v1; give a base_url such as https://"),
        (["--upstream", "ftp://model.example"], "give a base_url"),
        (["--upstream", "http://model.example:x/v1"], "give a base_url"),
        (["--upstream", "http://model.example:99999/v1"], "give a base_url"),
        (["--upstream", "http://[model/v1"], "give a base_url"),
        (["--upstream", "http://a:b@model.example/v1"], "without keys or queries"),
        (["--upstream", "http://model.example/v1?key=a"], "without keys or queries"),
        (["--port", "70000"], "--port is 70000; it must be 0 to 65535"),
        (["--redact", "nowhere:scrub"], "the redaction 'nowhere:scrub' cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_unusable_flags(flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["record", "--upstream", "http://127.0.0.1:9/v1", "--output", str(tmp_path / "t.jsonl"), *flags]
    assert main(given) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "t.jsonl").exists()


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = ["--upstream", "http://127.0.0.1:9/v1", "--port", port, "--output", str(tmp_path / "t.jsonl")]
        assert main(["record", *flags]) == 1
    assert "address already in use" in capsys.readouterr().err


def test_without_aiohttp(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcomm.replay.recording.command.find_spec", lambda name: None)
    assert main(["record", "--upstream", "http://127.0.0.1:9/v1", "--output", str(tmp_path / "t.jsonl")]) == 2
    assert "-m pip install 'kvcomm[record]'" in capsys.readouterr().err


def test_a_file_that_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "--upstream", "http://127.0.0.1:9/v1", "--port", "0", "--output", str(tmp_path)]) == 1
    assert "Is a directory" in capsys.readouterr().err


def test_the_page_about_recording_is_true(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names every flag and header, and all that a record may say of a failure."""
    page = (checkout / "docs" / "record.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["record", "--help"])
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help", "--quiet"}
    assert {flag for flag in flags if f"`{flag}" not in page and f" {flag} " not in page} == set()
    assert all(f"`{name}`" in page.lower() for name in SESSION_HEADERS)
    source = "".join((checkout / "kvcomm" / "replay" / "recording" / name).read_text() for name in ("_proxy.py", "exchange.py"))
    said = re.findall(r'"((?:upstream|client|recorder)_[a-z_]+)"', source)
    assert len(said) >= 4
    assert all(f"`{word}`" in page for word in said)
    assert f"{LIMIT >> 20} MiB" in page
