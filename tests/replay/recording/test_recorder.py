"""The file: private, appended to, whole lines whatever happens; and what a redaction may and may not do."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvcomm.errors import InputError
from kvcomm.replay.recording.recorder import Recorder, redaction
from kvcomm.replay.recording.span import PROBLEM, Record

if TYPE_CHECKING:
    from tests.replay.recording.conftest import Wire


def record(text: str = "Who?", **more: Any) -> Record:
    messages = [{"role": "user", "parts": [{"type": "text", "content": text}]}]
    return Record("chat", "s", "critic", 1, 2, model="m", messages=messages, **more)


FULL = record(
    "alice asks",
    instructions=[{"type": "text", "content": "alice is the boss"}],
    answers=[
        {
            "role": "assistant",
            "finish_reason": "tool_calls",
            "parts": [
                {"type": "reasoning", "content": "alice?"},
                {"type": "tool_call", "id": "c1", "name": "find", "arguments": '{"name": "alice"}'},
                {"type": "tool_call_response", "id": "c1", "response": "alice is here"},
            ],
        }
    ],
    tools=[
        {"type": "function", "function": {"name": "find", "description": "finds alice", "parameters": {"enum": ["alice"]}}},
        {"type": "function", "name": "find", "parameters": {"examples": [{"name": "alice", "type": "alice"}]}},
        "alice",
    ],
    attributes={"gen_ai.request.seed": 3},
    error="400",
    reason="no such person: alice",
)


def test_a_line_is_an_otlp_document() -> None:
    """Written out once, as the Collector's file exporter would have it."""
    made = record(
        answers=[{"role": "assistant", "parts": [], "finish_reason": "stop"}],
        attributes={"a": True, "b": 2, "c": 0.5, "d": ["x"]},
        error="429",
        reason="slow",
    )
    (resource,) = json.loads(made.line())["resourceSpans"]
    assert resource["resource"] == {"attributes": [{"key": "service.name", "value": {"stringValue": "kvcomm"}}]}
    (scope,) = resource["scopeSpans"]
    (span,) = scope["spans"]
    assert (len(bytes.fromhex(span.pop("traceId"))), len(bytes.fromhex(span.pop("spanId")))) == (16, 8)
    assert span == {
        "name": "chat m",
        "kind": 3,
        "startTimeUnixNano": "1",
        "endTimeUnixNano": "2",
        "attributes": [
            {"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}},
            {"key": "gen_ai.conversation.id", "value": {"stringValue": "s"}},
            {"key": "gen_ai.agent.name", "value": {"stringValue": "critic"}},
            {"key": "gen_ai.request.model", "value": {"stringValue": "m"}},
            {
                "key": "gen_ai.input.messages",
                "value": {"stringValue": '[{"role": "user", "parts": [{"type": "text", "content": "Who?"}]}]'},
            },
            {
                "key": "gen_ai.output.messages",
                "value": {"stringValue": '[{"role": "assistant", "parts": [], "finish_reason": "stop"}]'},
            },
            {"key": "gen_ai.response.finish_reasons", "value": {"arrayValue": {"values": [{"stringValue": "stop"}]}}},
            {"key": "error.type", "value": {"stringValue": "429"}},
            {"key": "a", "value": {"boolValue": True}},
            {"key": "b", "value": {"intValue": "2"}},
            {"key": "c", "value": {"doubleValue": 0.5}},
            {"key": "d", "value": {"arrayValue": {"values": [{"stringValue": "x"}]}}},
        ],
        "status": {"code": 2, "message": "slow"},
    }


def test_a_session_is_a_trace() -> None:
    def trace(made: Record) -> str:
        found: str = json.loads(made.line())["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["traceId"]
        return found

    assert trace(record("a")) == trace(record("b")) != trace(Record("chat", "t", "critic", 1, 2))


def test_the_file_is_the_users_alone_and_appended_to(wire: Wire) -> None:
    before = os.umask(0)
    try:
        for text in ("one\n\u2028", "Café 🍵 \ud800"):
            with Recorder(wire.file.parent / "new" / "trace.jsonl") as recorder:
                recorder.write(record(text))
    finally:
        os.umask(before)
    path = wire.file.parent / "new" / "trace.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    texts = [span["attributes"]["gen_ai.input.messages"][0]["parts"][0]["content"] for span in wire.spans(path)]
    assert texts == ["one\n\u2028", "Café 🍵 \ud800"]


def test_what_somebody_left_unfinished_stays_apart(wire: Wire) -> None:
    wire.file.write_bytes(record("one").line() + b'{"resourceSp')
    with Recorder(wire.file) as recorder:
        recorder.write(record("two"))
        recorder.write(record("three"))
    lines = wire.file.read_bytes().split(b"\n")
    assert lines.pop(1) == b'{"resourceSp'
    wire.file.write_bytes(b"\n".join(lines))
    assert len(wire.spans(wire.file)) == 3


def test_a_disk_that_is_full_and_then_is_not(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a line fits, the next one not at all, the last one does."""
    write, fits = os.write, [100, 0, 1 << 30]

    def full(file: int, data: bytes) -> int:
        room = fits[0] if len(fits) == 1 else fits.pop(0)
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:room])

    with Recorder(wire.file) as recorder:
        monkeypatch.setattr(os, "write", full)
        for text in ("one", "two"):
            recorder.write(record(text))
        monkeypatch.undo()
        assert (recorder.written, recorder.lost) == (1, 1)
    half, whole = wire.file.read_bytes().splitlines()
    assert half == record("one").line()[:100]
    assert json.loads(whole)
    assert caplog.messages == [f"recording: {wire.file}: No space left on device"]


def test_after_it_is_closed_calls_are_lost_and_nothing_else(wire: Wire) -> None:
    recorder = Recorder(wire.file)
    recorder.close()
    recorder.close()
    recorder.write(record())
    assert (recorder.written, recorder.lost) == (0, 1)


def test_a_call_that_cannot_be_made_is_lost_and_nothing_else(wire: Wire) -> None:
    def broken() -> list[Record]:
        raise RuntimeError("a bug, about alice")

    with Recorder(wire.file) as recorder:
        recorder.add(broken)
        recorder.write(record())
    assert (recorder.written, recorder.lost) == (1, 1)
    assert dict(recorder.problems) == {"a call cannot be written down: RuntimeError": 1}


def test_threads_do_not_mix_lines(wire: Wire) -> None:
    with Recorder(wire.file, str.upper) as recorder, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: recorder.write(record(f"t{n} " * 5000)), range(64)))
    texts = {span["attributes"]["gen_ai.input.messages"][0]["parts"][0]["content"] for span in wire.spans(wire.file)}
    assert texts == {f"T{n} " * 5000 for n in range(64)}
    assert recorder.written == 64


def test_killed_at_any_moment_every_whole_line_can_be_read(wire: Wire) -> None:
    """Three processes append to one file, and are killed."""
    code = (
        "import sys; from kvcomm.replay.recording.recorder import Recorder; from kvcomm.replay.recording.span import Record\n"
        "recorder = Recorder(sys.argv[1])\n"
        "message = {'role': 'user', 'parts': [{'type': 'text', 'content': sys.argv[2] * 100_000}]}\n"
        "while True:\n"
        "    recorder.write(Record('chat', 's', sys.argv[2], 1, 2, messages=[message]))\n"
        "    if recorder.written == 20: print('busy', flush=True)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(wire.file), name], stdout=subprocess.PIPE, text=True)
        for name in "abc"
    ]
    for writer in writers:
        with writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "busy\n"
            writer.kill()
        assert writer.returncode == -signal.SIGKILL
    *lines, rest = wire.file.read_bytes().split(b"\n")
    parts = [line for line in lines if line and not line.endswith(b"]}")]
    assert len(parts) <= len(writers), "a killed writer spoils its own last line and no other"
    wire.file.write_bytes(b"".join(line + b"\n" for line in lines if line and line not in parts))
    agents = [span["attributes"]["gen_ai.agent.name"] for span in wire.spans(wire.file)]
    assert all(agents.count(name) >= 20 for name in "abc")
    with Recorder(wire.file) as recorder:
        recorder.write(record())
    assert len(wire.spans(wire.file)) == len(agents) + 1
    assert len(rest) < 110_000


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        Recorder(tmp_path)


# -- redaction --------------------------------------------------------------------------------------------------------------


def test_every_text_passes_the_redaction() -> None:
    """Names, roles, types and ids stay; nothing else of the call does."""
    clean = FULL.redacted(lambda text: text.replace("alice", "[name]"))
    assert b"alice" not in clean.line()
    assert clean.line().count(b"[name]") == FULL.line().count(b"alice") == 11
    gone = FULL.redacted(lambda text: "")
    assert gone.answers[0]["parts"][1] == {"type": "tool_call", "id": "c1", "name": "find", "arguments": ""}
    assert gone.tools[0] == {"type": "function", "function": {"name": "find", "description": "", "parameters": {"enum": [""]}}}
    assert (gone.agent, gone.error, gone.attributes) == ("critic", "400", {"gen_ai.request.seed": 3})


def quoting(text: str) -> str:
    raise ValueError(f"cannot read {text!r}")


@pytest.mark.parametrize(
    ("redact", "why"), [(quoting, "ValueError"), (lambda text: None, "TypeError"), (lambda text: b"", "TypeError")]
)
def test_where_the_redaction_fails_there_is_no_text(
    wire: Wire, redact: Callable[[str], Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Recorder(wire.file, redact) as recorder:
        recorder.write(FULL)
        recorder.write(FULL)
    assert "alice" not in wire.file.read_text()
    one, two = wire.spans(wire.file)
    assert one["attributes"] == two["attributes"]
    assert one["attributes"] == {
        "gen_ai.operation.name": "chat",
        "gen_ai.conversation.id": "s",
        "gen_ai.agent.name": "critic",
        "gen_ai.request.model": "m",
        "error.type": "400",
        "gen_ai.request.seed": "3",
        PROBLEM: f"the redaction failed: {why}",
    }
    assert (recorder.written, recorder.without_text, recorder.lost) == (2, 2, 0)
    assert caplog.record_tuples == [
        ("kvcomm.replay.recording.recorder", logging.WARNING, f"recording: the redaction failed: {why}")
    ]


def test_redactions_are_found_by_name() -> None:
    assert redaction("html:escape")("<") == "&lt;"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("html", "give a function from a text to a text as module:function"),
        (":escape", "give a function"),
        ("html:nosuch", "cannot be loaded: AttributeError"),
        ("nosuch.module:f", "cannot be loaded: ModuleNotFoundError: No module named 'nosuch'"),
        ("html:__name__", "give a function"),
    ],
)
def test_a_redaction_that_is_none(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        redaction(name)
