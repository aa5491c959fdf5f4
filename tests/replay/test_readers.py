"""Traces in every format, beside the calls that they were written from; and the files that people really have."""

from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvcomm.errors import InputError
from kvcomm.replay.calls import Call, Message
from kvcomm.replay.readers import FORMATS, Trace, documents, read_trace, sessions
from kvcomm.replay.readers.base import Format

Write = Callable[[Sequence[Call]], bytes]
Chat = Callable[..., list[Call]]


def told(calls: Sequence[Call]) -> list[tuple[str, str, tuple[Message, ...]]]:
    return [(c.session, c.agent, c.messages) for c in calls]


def saved(tmp_path: Path, data: bytes, name: str = "trace.json") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_every_format_gives_the_same_calls(write: Write, calls: list[Call], tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, write(calls)), strict=True)
    read = list(trace)
    assert told(read) == told(calls)
    assert trace.formats.total() == len(calls)
    assert (trace.skipped, trace.unknown) == (0, 0)
    for a, b in zip(read, calls, strict=True):  # AIPerf's format has no outputs; those that somebody read later are found
        assert a.output == b.output or (not a.answered and a.output == "")
    assert sum(c.answered for c in read) >= len(calls) - 2  # the last one of each session


def test_the_name_of_the_file_says_nothing(write: Write, calls: list[Call], tmp_path: Path) -> None:
    whole = read_trace(saved(tmp_path, write(calls), "notes.txt"))
    zipped = read_trace(saved(tmp_path, gzip.compress(write(calls)), "no-ending"))
    assert told(list(whole)) == told(list(zipped)) == told(calls)


def test_a_folder_of_files(calls: list[Call], write: Write, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    one, two = ([c for c in calls if c.session == s] for s in ("one", "two"))
    saved(tmp_path / "deep" / "er", write(one), "a.json")
    saved(tmp_path, gzip.compress(write(two)), "z.jsonl.gz")
    saved(tmp_path, b"not a trace", "README.md")
    saved(tmp_path, b"not a trace", ".hidden.json")
    (tmp_path / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    trace = read_trace(tmp_path, strict=True)
    assert sorted(told(list(trace)), key=str) == sorted(told(calls), key=str)


def test_interleaved_sessions_come_one_after_the_other(calls: list[Call], write: Write, tmp_path: Path) -> None:
    one, two = ([c for c in calls if c.session == s] for s in ("one", "two"))
    mixed = [c for pair in zip(one, two, strict=True) for c in pair]
    assert told(list(read_trace(saved(tmp_path, write(mixed)), strict=True))) == told(calls)


def test_calls_are_in_order_of_time_where_all_have_one(calls: list[Call], hand: Write, tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(calls[:6], 6)
    assert told(list(read_trace(saved(tmp_path, hand(shuffled))))) == told(calls[:6])
    rows = [json.loads(line) for line in hand(shuffled).splitlines()]
    del rows[3]["timestamp"]
    data = "\n".join(map(json.dumps, rows)).encode()
    assert told(list(read_trace(saved(tmp_path, data)))) == told(shuffled)


def test_a_session_leaves_when_it_is_silent_or_memory_is_short(
    calls: list[Call], hand: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same calls, each once; only where they are put changes."""
    one, two = ([c for c in calls if c.session == s] for s in ("one", "two"))
    mixed = [one[0], *two, *one[1:]]
    path = saved(tmp_path, hand(mixed))
    for name, value in (("IDLE", 3), ("HELD_BYTES", 4000)):
        with monkeypatch.context() as m:
            m.setattr(sessions, name, value)
            read = list(read_trace(path))
        assert told(read) != told(calls)
        assert sorted(told(read), key=str) == sorted(told(calls), key=str)
        assert [c for c in told(read) if c[0] == "one"] == told(one)


def test_names_come_from_the_spans_around(tmp_path: Path) -> None:
    """Two levels up, before or after the call in the file; the nearest name wins; a span inside itself is no endless way."""

    def span(id_: str, parent: str | None, **attributes: str) -> dict[str, Any]:
        return {"trace_id": "t", "span_id": id_, "parent_span_id": parent, "attributes": attributes}

    text = {"gen_ai.input.messages": json.dumps([{"role": "user", "content": "hi"}])}
    spans = [
        span("top", None, **{"gen_ai.conversation.id": "talk", "gen_ai.agent.name": "far"}),
        span("call", "tool", **text),
        span("tool", "near", **{"gen_ai.operation.name": "execute_tool"}),
        span("near", "top", **{"gen_ai.agent.name": "near"}),
        span("loop", "circle", **text),
        span("circle", "loop"),
    ]
    first, second = read_trace(saved(tmp_path, json.dumps({"spans": spans}).encode()), strict=True)
    assert (first.id, first.agent, first.session) == ("call", "near", "talk")
    assert (second.id, second.session) == ("loop", "t")
    assert second.agent.startswith("unnamed-")


def test_unnamed_agents_are_told_apart_by_their_system_message(calls: list[Call], hand: Write, tmp_path: Path) -> None:
    read = list(read_trace(saved(tmp_path, hand([replace(c, agent="") for c in calls]))))
    names: dict[tuple[str, str], str] = {}
    for a, b in zip(read, calls, strict=True):
        assert names.setdefault((b.session, b.agent), a.agent) == a.agent
    assert len(set(names.values())) == 6


def test_turns_that_record_only_what_is_new(tmp_path: Path) -> None:
    rows = [
        {"session_id": "s#a", "message_mode": "delta", "messages": [{"role": "user", "content": "one"}], "output": "two"},
        {"session_id": "s#b", "assistant_responses": "live", "messages": [{"role": "user", "content": "else"}]},
        {"session_id": "s#a", "message_mode": "delta", "messages": [{"role": "user", "content": "three"}]},
        {"session_id": "s#b", "assistant_responses": "live", "messages": [{"role": "user", "content": "more"}]},
    ]
    read = list(read_trace(saved(tmp_path, "\n".join(map(json.dumps, rows)).encode()), strict=True))
    assert [[m.content for m in c.messages] for c in read] == [["one"], ["else"], ["one", "two", "three"], ["else", "more"]]
    assert [c.agent for c in read] == ["a", "b", "a", "b"]


def test_an_output_is_not_taken_from_a_prompt_that_does_not_show_it(tmp_path: Path) -> None:
    rows = [
        {"session_id": "s", "agent": "a", "messages": [{"role": "user", "content": "one"}]},
        {"session_id": "s", "agent": "b", "messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]},
        {"session_id": "s", "agent": "a", "messages": [{"role": "user", "content": "two"}]},
    ]
    assert [c.answered for c in read_trace(saved(tmp_path, "\n".join(map(json.dumps, rows)).encode()))] == [False] * 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"role": "user", "content": "plain"}, "plain"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "image_url", "image_url": {}}]}, "a\nb"),
        ({"role": "tool", "content": None}, ""),
        (
            {"role": "user", "parts": [{"type": "text", "content": "a"}, {"type": "tool_call_response", "response": {"x": 1}}]},
            'a\n{"x": 1}',
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x":1}'}}]},
            '{"name": "f", "arguments": {"x": 1}}',
        ),
        (
            {"role": "assistant", "parts": [{"type": "tool_call", "name": "f", "arguments": {"x": 1}}]},
            '{"name": "f", "arguments": {"x": 1}}',
        ),
        (
            {"role": "assistant", "content": "t", "tool_calls": [{"name": "f", "args": {"x": 1}}]},
            't\n{"name": "f", "arguments": {"x": 1}}',
        ),
        ({"role": "user", "content": "half a pair \ud83d here"}, "half a pair ? here"),
        ("a message that is a string", "a message that is a string"),
    ],
)
def test_shapes_of_a_message(shape: object, expected: str, tmp_path: Path) -> None:
    row = {"session_id": "s", "agent": "a", "messages": [shape], "output": {"role": "assistant", "content": [{"text": "out"}]}}
    (call,) = read_trace(saved(tmp_path, json.dumps(row).encode()), strict=True)
    assert (call.messages[0].content, call.output) == (expected, "out")


def test_log_records(tmp_path: Path) -> None:
    """A call that is logged as one event has its names from its span; events of single messages are named and left out."""

    def logs(name: str, **attributes: str) -> dict[str, Any]:
        said = [{"key": k, "value": {"stringValue": v}} for k, v in attributes.items()]
        record = {"traceId": "t", "spanId": "s", "eventName": name, "timeUnixNano": "1700000000000000000", "attributes": said}
        return {"resourceLogs": [{"scopeLogs": [{"logRecords": [record]}]}]}

    prompt = {"gen_ai.input.messages": json.dumps([{"role": "user", "content": "hi"}])}
    span = {"traceId": "t", "spanId": "s", "attributes": {"gen_ai.agent.name": "critic", "gen_ai.conversation.id": "talk"}}
    rows = [
        span,
        logs("gen_ai.client.inference.operation.details", **prompt),
        logs("gen_ai.user.message", content="hi"),
        logs("other"),
    ]
    read, trace = read_with_problems(saved(tmp_path, "\n".join(map(json.dumps, rows)).encode()))
    assert [(c.session, c.agent, c.messages, c.started) for c in read] == [("talk", "critic", (Message("user", "hi"),), 1.7e9)]
    assert [str(p).partition(": of")[0] for p in trace.problems] == ["trace.json:3: a log record of gen_ai.user.message"]


def test_nested_runs_and_other_kinds(tmp_path: Path) -> None:
    llm = {
        "id": "i",
        "run_type": "llm",
        "parent_run_id": "n",
        "inputs": {"prompts": ["hi"]},
        "outputs": {"content": "yo"},
        "trace_id": "t",
    }
    node = {
        "id": "n",
        "run_type": "chain",
        "trace_id": "t",
        "extra": {"metadata": {"langgraph_node": "critic"}},
        "child_runs": [llm],
    }
    tool = {"id": "x", "run_type": "tool", "trace_id": "t", "inputs": {}}
    for data in (json.dumps([node, tool]), json.dumps([node, tool], indent=1), json.dumps(node) + "\n" + json.dumps(tool)):
        (call,) = read_trace(saved(tmp_path, data.encode()), strict=True)
        assert (call.agent, call.output, call.session, call.messages) == ("critic", "yo", "t", (Message("user", "hi"),))


def test_mooncake_without_text_is_refused(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 655, "output_length": 52, "hash_ids": [0, 1, 2]}
    with pytest.raises(InputError, match=r"m.jsonl: this trace has no text .*hash_ids"):
        list(read_trace(saved(tmp_path, json.dumps(row).encode(), "m.jsonl")))


# ------------------------------------------------------------------------------------------------------ hostile files


def read_with_problems(path: Path) -> tuple[list[Call], Trace]:
    trace = read_trace(path)
    calls = list(trace)
    with pytest.raises(InputError):
        list(read_trace(path, strict=True))
    return calls, trace


def test_cut_in_half(write: Write, calls: list[Call], tmp_path: Path) -> None:
    """The whole records before the cut are read, and one message names the place."""
    data = write(calls)
    read, trace = read_with_problems(saved(tmp_path, data[: len(data) * 2 // 3]))
    assert 0 < len(read) < len(calls)
    assert trace.skipped == 1
    assert "not JSON" in str(trace.problems[0])


def test_zipped_and_cut(calls: list[Call], hand: Write, tmp_path: Path) -> None:
    data = gzip.compress(hand(calls * 30))
    read, trace = read_with_problems(saved(tmp_path, data[: len(data) // 2]))
    assert read
    assert any("cannot be unpacked" in str(p) for p in trace.problems)


def test_broken_lines_are_named_counted_and_left_out(calls: list[Call], hand: Write, tmp_path: Path) -> None:
    good = hand(calls).splitlines()
    bad = {
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}': "not UTF-8",
        b'{"messages": ': "not JSON",
        b"[1, 2]": "a list",
        b'"text"': "a str",
        b"17": "a int",
        b'{"messages": "x"': "not JSON",
        b'{"messages": 3}': "messages is a int",
        b'{"messages": [3]}': "messages[0] is a int",
        b'{"messages": []}': "messages is empty",
        b'{"messages": [{"role": 5, "content": "x"}]}': "messages[0].role is a int",
        b'{"messages": [{"role": "user", "content": 5}]}': "messages[0].content is a int",
        b'{"messages": null}': "messages is missing",
        b'{"messages": [{"role": "user", "content": "x"}], "output": 5}': "output is a int",
        b"{}": "no known format",
        b'{"some": "thing", "else": 1}': "else, some",
        b'{"attributes": 5, "span_id": "x", "messages": true}': "messages is a bool",
        b'{"span_id": "x", "attributes": {"gen_ai.operation.name": "chat"}}': "a call (chat) without its messages",
        b'{"run_type": "llm", "inputs": 3}': "without inputs",
        b'{"span_id": "x", "attributes": {"gen_ai.input.messages": 5}}': "gen_ai.input.messages is a int",
        b'{"span_id": "x", "attributes": {"openinference.span.kind": "LLM"}}': "an LLM span without llm.input_messages",
        b'{"messages": ' + b"[" * 100_000: "",
        b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}": "",
        b'{"n": ' + b"9" * 5000 + b"}": "",
    }
    data = b"\n".join([good[0], *bad, *good[1:]])
    read, trace = read_with_problems(saved(tmp_path, data, "t.jsonl"))
    assert told(read) == told(calls)
    assert trace.skipped == len(bad)
    for number, (problem, reason) in enumerate(zip(trace.problems, bad.values(), strict=False), 2):
        assert str(problem).startswith(f"t.jsonl:{number}: ")
        assert reason in problem.reason


def test_one_line_of_50_mb(calls: list[Call], hand: Write, tmp_path: Path) -> None:
    """Between good lines it is left out; alone it is refused. Neither is ever held whole."""
    line = b'{"session_id": "s", "agent": "a", "messages": [{"role": "user", "content": "' + b"word " * 10_000_000 + b'"}]}\n'
    path = saved(tmp_path, hand(calls[:6]) + line + hand(calls[6:]))
    tracemalloc.start()
    trace = read_trace(path)
    read = list(trace)
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()
    assert told(read) == told(calls)
    assert [str(p) for p in trace.problems] == ["trace.json:7: longer than 16 MiB"]
    with pytest.raises(InputError, match="longer than 16 MiB"):
        list(read_trace(saved(tmp_path, line)))


BROKEN = b'{"broken": \n'
MANY = " ".join(["word"] * 260_000)  # 1.3 MB
LINES: dict[str, dict[str, Any]] = {
    "a call": {"session_id": "s", "agent": "a", "messages": [{"role": "user", "content": MANY}]},
    "a wrapper": {"data": [{"session_id": "s", "agent": "a", "messages": [{"role": "user", "content": MANY}]}]},
}


@pytest.mark.parametrize("kind", LINES)
def test_a_first_line_longer_than_is_looked_at(kind: str, calls: list[Call], hand: Write, tmp_path: Path) -> None:
    """Lines stay lines: a broken one behind it takes nothing with it."""
    line = json.dumps(LINES[kind]).encode() + b"\n"
    data = line + BROKEN + hand(calls)
    for packed in (data, gzip.compress(data)):
        read, trace = read_with_problems(saved(tmp_path, packed))
        assert told(read) == [("s", "a", (Message("user", MANY),)), *told(calls)]
        assert [p.where for p in trace.problems] == ["trace.json:2"]


@pytest.mark.parametrize(
    ("line", "said"),
    [(b'{"messages": "' + b"word " * 10_000_000, "longer than 16 MiB"), (b'{"messages": ' + b"9" * 2_000_000, "not JSON")],
)
def test_a_first_line_that_cannot_be_used(line: bytes, said: str, calls: list[Call], hand: Write, tmp_path: Path) -> None:
    path = saved(tmp_path, line + b"\n" + hand(calls))
    tracemalloc.start()
    trace = read_trace(path)
    assert told(list(trace)) == told(calls)
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()
    assert [p.where for p in trace.problems] == ["trace.json:1"]
    assert said in trace.problems[0].reason


def test_a_document_that_begins_with_a_very_long_line(calls: list[Call], hand: Write, tmp_path: Path) -> None:
    first = json.dumps(LINES["a call"]).encode()
    data = b'{"data": [' + b",\n".join([first, *hand(calls).splitlines()]) + b"]}"
    assert told(list(read_trace(saved(tmp_path, data), strict=True)))[1:] == told(calls)


def test_blank_lines_are_skipped_many_at_once(
    calls: list[Call], hand: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is behind them is read and named by its line; hardly any of them is looked at."""
    looked: list[int] = []
    real = documents._Limited.lines

    def counted(self: Any) -> Any:
        for found in real(self):
            looked.append(found[0])
            yield found

    monkeypatch.setattr(documents._Limited, "lines", counted)
    good, blank = hand(calls), 20_000_000
    trace = read_trace(saved(tmp_path, gzip.compress(good + b"\n" * blank + BROKEN + good, 1)))
    assert len(list(trace)) == 2 * len(calls)
    assert [p.where for p in trace.problems] == [f"trace.json:{len(calls) + blank + 1}"]
    assert len(looked) < blank // 10


def test_a_document_is_never_held(calls: list[Call], chat: Chat, tmp_path: Path) -> None:
    """One JSON document on one line, 60 MB: memory is that of what is held for a session, not of the file."""
    span = json.dumps({"trace_id": "t", "span_id": "s", "attributes": {"tool.output": "x" * 100_000}})
    data = '{"spans": [' + ", ".join([span] * 600)
    call = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    path = saved(tmp_path, (data + f", {call}]}}").encode())
    tracemalloc.start()
    assert len(list(read_trace(path, strict=True))) == 1
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("where", ["tools", "gen_ai.tool.definitions"])
def test_definitions_of_tools_are_not_held(where: str, tmp_path: Path) -> None:
    """A session of short messages whose calls each bring 10 kB of them."""
    tools = [{"name": f"tool_{i}", "parameters": {f"p{j}": {"type": "string"} for j in range(6)}} for i in range(60)]
    row: dict[str, Any] = {"session_id": "s", "agent": "a", "messages": [{"role": "user", "content": "hi"}], where: tools}
    if where != "tools":
        said = {"gen_ai.input.messages": json.dumps(row["messages"]), where: json.dumps(tools)}
        row = {"trace_id": "t", "span_id": "s", "attributes": said}
    path = saved(tmp_path, (json.dumps(row) + "\n").encode() * 600)
    tracemalloc.start()
    assert len(list(read_trace(path, strict=True))) == 600
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("number", ["--5", "\u00b2", "-", "5-", "9" * 5000])
def test_a_whole_number_that_is_none(number: str, tmp_path: Path) -> None:
    said = {"gen_ai.input.messages": {"stringValue": "hi"}, "gen_ai.usage.input_tokens": {"intValue": number}}
    span = {"traceId": "t", "spanId": "s", "attributes": [{"key": k, "value": v} for k, v in said.items()]}
    (call,) = read_trace(saved(tmp_path, json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}).encode()))
    assert call.messages == (Message("user", "hi"),)


@pytest.mark.parametrize("data", [b"", b" \n\n ", b"[]", b"{}", b'{"spans": []}', gzip.compress(b"")], ids=repr)
def test_empty(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is nothing in it|no call of a model"):
        list(read_trace(saved(tmp_path, data)))


@pytest.mark.parametrize(
    "data", [b"\x00\x01\x02" * 5000, b"hello, world\n" * 100, b"[" * 100_000, b'{"a":' * 100_000, b"\x1f\x8bnot gzip"]
)
def test_no_trace_at_all(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no call of a model"):
        list(read_trace(saved(tmp_path, data)))


def test_spans_without_a_call(tmp_path: Path) -> None:
    spans = [{"span_id": str(i), "attributes": {"gen_ai.operation.name": "execute_tool"}} for i in range(3)]
    with pytest.raises(InputError, match="3 records, and none of them is a call"):
        list(read_trace(saved(tmp_path, json.dumps({"spans": spans}).encode())))


def test_a_record_too_large_inside_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_RECORD", 1 << 20)
    row = {"messages": [{"role": "user", "content": "hi"}]}
    data = json.dumps([row, {"messages": [{"role": "user", "content": "x" * (8 << 20)}]}, row])
    read, trace = read_with_problems(saved(tmp_path, data.encode()))
    assert len(read) == 1
    assert str(trace.problems[0]) == "trace.json, record 2: longer than 1 MiB; nothing behind it was read"


def test_duplicate_ids(calls: list[Call], write: Write, tmp_path: Path) -> None:
    """Every call counts. Where names come from the spans around, equal ids make one of them count for all."""
    same = [replace(c, id="same") for c in calls]
    read = list(read_trace(saved(tmp_path, write(same)), strict=True))
    assert [(c.session, c.messages) for c in read] == [(c.session, c.messages) for c in calls]


def test_a_hundred_thousand_messages_of_one_word(hand: Write, tmp_path: Path) -> None:
    messages = tuple(Message("user", "word") for _ in range(100_000))
    (call,) = read_trace(saved(tmp_path, hand([Call("s", "a", messages, "out")])), strict=True)
    assert call.messages == messages


def test_a_folder_with_what_cannot_be_read(calls: list[Call], hand: Write, tmp_path: Path) -> None:
    saved(tmp_path, hand(calls), "good.jsonl")
    saved(tmp_path, b'{"hash_ids": [1]}', "mooncake.jsonl")
    saved(tmp_path, b"", "empty.json")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    saved(tmp_path, b"\x1f\x8b\x08rest", "broken.json.gz")
    read, trace = read_with_problems(tmp_path)
    assert told(read) == told(calls)
    assert trace.skipped == len(trace.problems) == 2


def test_a_folder_of_other_names(tmp_path: Path) -> None:
    saved(tmp_path, b"{}", "trace.log")
    saved(tmp_path, b"{}", "notes.txt")
    with pytest.raises(InputError, match=r"2 files, none named \.json, \.jsonl, \.ndjson \(or \.gz\)"):
        list(read_trace(tmp_path))


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[Call], hand: Write) -> None:
    """Permissions do not bind everybody who runs tests, so the refusal is the file's own."""
    saved(tmp_path, hand(calls), "good.jsonl")
    bad = saved(tmp_path, b"x", "bad.json")
    real = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == bad:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    read, trace = read_with_problems(tmp_path)
    assert told(read) == told(calls)
    assert [str(p) for p in trace.problems] == ["bad.json: cannot be read: Permission denied"]
    with pytest.raises(InputError, match=r"bad.json cannot be read: Permission denied"):
        list(read_trace(bad))


@pytest.mark.parametrize("name", ["nowhere", "pipe"])
def test_neither_file_nor_folder(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"does not exist|is no file and no folder"):
        list(read_trace(tmp_path / name))


JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e300,
    10**400,
    "",
    "x",
    "[{",
    "[1]",
    '{"role": 5}',
    [],
    [[]],
    {},
    {"a": {}},
    {"role": "user"},
    "\ud800",
)


def spoiled(value: Any, rng: random.Random) -> Any:
    """The same with something else somewhere in it."""
    if isinstance(value, str) and value.endswith(("]", "}")) and rng.random() < 0.7:
        return json.dumps(spoiled(json.loads(value), rng)) if value[0] in "[{" else value
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.1:
            return (
                [v for i, v in enumerate(value) if i != key]
                if isinstance(value, list)
                else {k: v for k, v in value.items() if k != key}
            )
        out = copy(value)
        out[key] = spoiled(value[key], rng)
        return out
    return rng.choice(JUNK)


def test_anything_anywhere(write: Write, chat: Chat, tmp_path: Path) -> None:
    """Whatever stands where, what comes out are calls or InputError."""
    rng = random.Random(0)
    data = write(chat("s", rng, rounds=2, words=2))
    lines = data.splitlines() if data.count(b"\n") == 2 else [data]
    for _ in range(150):
        rows = [json.loads(line) for line in lines]
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(rows))
            rows[at] = spoiled(rows[at], rng)
        try:
            for call in read_trace(saved(tmp_path, "\n".join(map(json.dumps, rows)).encode())):
                assert call.session
                assert call.agent
                assert all(isinstance(text, str) for m in call.messages for text in (m.role, m.content, m.name))
                (call.output + call.session + call.agent + "".join(m.role + m.content + m.name for m in call.messages)).encode()
        except InputError:
            pass


def test_a_new_format_is_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of `kvcomm.replay.readers.base`, followed."""

    class Mine:
        name = "mine"

        def fits(self, record: Any) -> bool:
            return "my_prompt" in record

        def read(self, record: Any, where: str) -> list[Call]:
            return [Call(record["run"], record["who"], (Message("user", record["my_prompt"]),), record["answer"], where=where)]

    formats: tuple[type[Format], ...] = (*FORMATS, Mine)
    monkeypatch.setattr("kvcomm.replay.readers.FORMATS", formats)
    (call,) = read_trace(saved(tmp_path, b'{"my_prompt": "p", "run": "r", "who": "w", "answer": "a"}'))
    assert (call.session, call.agent, call.output, call.where) == ("r", "w", "a", "trace.json:1")
