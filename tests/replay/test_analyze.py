"""`kvcomm analyze`: the same numbers from every format, what it prints and writes, and how it ends on bad input."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from kvcomm import cli
from kvcomm.errors import InputError
from kvcomm.replay.analysis.command import KEYS, analyze
from kvcomm.replay.analysis.page import CLASSES, page, terminal
from kvcomm.replay.analysis.totals import Totals
from kvcomm.replay.calls import Call, Message
from kvcomm.tiny import FOLDER

Write = Callable[[Sequence[Call]], bytes]
Chat = Callable[..., list[Call]]
VARIES = ("created_utc", "trace", "formats", "read")


def numbers(doc: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in doc.items() if key not in VARIES}


def saved(tmp_path: Path, data: bytes, name: str = "trace.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_every_format_gives_the_same_numbers(write: Write, hand: Write, calls: list[Call], tmp_path: Path) -> None:
    doc = analyze(saved(tmp_path, write(calls)), strict=True)
    assert numbers(doc) == numbers(analyze(saved(tmp_path, hand(calls)), strict=True))
    assert doc["cross_agent_non_prefix"] > 0.2


def test_recorded_traces_give_the_same_numbers_in_every_format(recorded: Path) -> None:
    """Those in KVCOMM_TRACES, or a made-up one: lines by hand, AIPerf's, and one session in OpenTelemetry."""
    folders = [path.parent for path in sorted(recorded.rglob("calls.jsonl"))]
    assert folders
    for folder in folders:
        lines, aiperf = (analyze(folder / name, strict=True) for name in ("calls.jsonl", "aiperf_mooncake_messages.jsonl"))
        assert numbers(lines) == numbers(aiperf)
        otel = folder / "otel_genai_one_session.json"
        one = json.loads(otel.read_text())["spans"][0]["attributes"]["gen_ai.conversation.id"]
        assert numbers(analyze(otel, strict=True)) == numbers(analyze(folder / "calls.jsonl", only=[one], strict=True))


def test_shares_and_tokens_add_up(hand: Write, calls: list[Call], tmp_path: Path) -> None:
    doc = analyze(saved(tmp_path, hand(calls)))
    four = [key for key, _, _ in CLASSES]
    for of in (doc, *doc["per_agent"]):
        assert sum(of[key] for key in four) == pytest.approx(1)
        assert set(KEYS) <= of.keys()
        per_call = of["tokens_per_call"]
        assert sum(per_call[key] for key in four) == pytest.approx(per_call["prompt"])
    assert doc["tokens_per_call"]["prompt"] * doc["calls"] == pytest.approx(doc["prompt_tokens"])
    assert sum(p["tokens"] for p in doc["pairs"]) == pytest.approx(doc["cross_agent_non_prefix"] * doc["prompt_tokens"])
    assert sum(a["prompt_tokens"] for a in doc["per_agent"]) == doc["prompt_tokens"]
    assert doc["found_by"]["runs_of_16_tokens"] == doc["cross_agent_non_prefix"]
    assert sum(b["runs"] for b in doc["runs"]["by_length"]) == doc["runs"]["count"]
    assert (doc["sessions"], doc["calls"], doc["agents"]) == (2, 12, 3)


def test_who_reads_whose_text(hand: Write, tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(40))
    calls = [
        Call("s", "writer", (Message("user", "go"),), words),
        Call("s", "reader", (Message("system", "read this"), Message("user", words)), "ok"),
        Call("t", "reader", (Message("user", words),), "in a session of its own"),
    ]
    doc = analyze(saved(tmp_path, hand(calls)))
    (pair,) = doc["pairs"]
    assert (pair["source"], pair["reader"], pair["tokens"]) == ("writer", "reader", 80)  # each "word7" is two pre-tokens
    assert doc["found_by"]["whole_messages"] == doc["cross_agent_non_prefix"]


def test_a_tokenizer_counts_as_it_does(hand: Write, calls: list[Call], tmp_path: Path) -> None:
    path = saved(tmp_path, hand(calls))
    doc = analyze(path, tokenizer=FOLDER)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    counted = sum(1 + len(tokenizer.encode(m.content, add_special_tokens=False).ids) for c in calls for m in c.messages)
    assert doc["prompt_tokens"] == counted
    assert not doc["tokens_are_estimated"]
    assert numbers(doc) == numbers(analyze(path, tokenizer=FOLDER / "tokenizer.json")) | {"tokenizer": str(FOLDER)}
    assert doc["cross_agent_non_prefix"] == pytest.approx(analyze(path)["cross_agent_non_prefix"], abs=0.05)


def test_neither_torch_nor_transformers_is_loaded(hand: Write, calls: list[Call], tmp_path: Path) -> None:
    """In a process of its own, from the command line to the page, with and without a tokenizer."""
    path = saved(tmp_path, hand(calls))
    code = (
        "import sys; from kvcomm import cli\n"
        f"for more in ([], ['--tokenizer', {str(FOLDER)!r}]):\n"
        f"    assert cli.main(['analyze', {str(path)!r}, '--output', {str(tmp_path)!r}, '--format', 'json', *more]) == 0\n"
        "print('loaded', sorted({'torch', 'transformers', 'faiss'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1:] == ["loaded []"], done.stderr


def test_terminal_says_what_the_document_says(hand: Write, calls: list[Call], tmp_path: Path) -> None:
    out = terminal(analyze(saved(tmp_path, hand(calls) + b"{}\n")))
    assert out.splitlines()[-1].startswith("Worth it: ")
    for said in (
        "2 sessions, 12 calls, 3 agents",
        "an estimate",
        "1 record was left out, the first: trace.jsonl:13",
        "agent-2",
    ):
        assert said in out


class Tags(HTMLParser):
    """What a page loads, and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("agents", [1, 3, 12])
def test_page(agents: int, hand: Write, chat: Chat, tmp_path: Path) -> None:
    calls = chat("<b>s</b>", random.Random(0), rounds=2 * agents, agents=agents)
    calls.append(Call("<b>s</b>", "<script>x", calls[-1].messages, "out"))
    tags = Tags()
    text = page(analyze(saved(tmp_path, hand(calls) + b"{}\n", "<i>.jsonl")))
    tags.feed(text)
    assert (tags.open, tags.links) == ([], [])
    assert "script" not in tags.seen
    assert "&lt;script&gt;x" in text
    assert "prefers-color-scheme: dark" in text


def test_command(hand: Write, calls: list[Call], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, hand(calls))
    assert cli.main(["analyze", str(path), "--format", "json", "--output", str(tmp_path / "new"), "--session", "two"]) == 0
    doc = json.loads(capsys.readouterr().out)
    assert doc == json.loads((tmp_path / "new" / "analyze.json").read_text())
    assert "What these agents could share" in (tmp_path / "new" / "analyze.html").read_text()
    assert (doc["schema"], doc["sessions"], doc["calls"]) == ("kvcomm.analyze/1", 1, 6)
    assert cli.main(["analyze", str(path), "--min-run", "300", "-q"]) == 0
    assert "300 tokens or more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--session", "none"], r"--session is none; the trace has one, two"),
        (["--min-run", "1"], r"--min-run is 1"),
        (["--tokenizer", "/nowhere"], r"no tokenizer.json there"),
        (["--tokenizer", __file__], r"is no tokenizer"),
        (["--strict"], r"trace.jsonl:13: no known format"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(
    flags: list[str], said: str, hand: Write, calls: list[Call], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, hand(calls) + b"{}\n")
    assert cli.main(["analyze", str(path), *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "half": b'{"spans": [{"trace_id": "t", "span_id": "s", "attributes": {"gen_ai.input.messages": "[{\\"role\\": \\"us',
    "bytes": bytes(range(256)) * 100,
    "not UTF-8": b'{"messages": [{"role": "user", "content": "\xff"}]}\n' * 3,
    "wrong types": b'{"messages": 5, "session_id": []}\n[]\n{"messages": [[]]}\n',
    "deep": b"[" * 1_000_000,
    "deep object": b'{"spans": [{"attributes": ' + b'{"a":' * 50_000,
    "one 50 MB line": b'{"messages": "' + b"a" * 50_000_000 + b'"}',
    "no text": b'{"timestamp": 0, "hash_ids": [1, 2], "input_length": 5}\n',
    "zeros": b"\0" * 10_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, HOSTILE[name])
    assert cli.main(["analyze", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kvcomm: InputError: ")
    assert (err.count("\n"), "trace.jsonl" in err) == (1, True)
    assert len(err) < 500


@pytest.mark.parametrize("name", ["trace.jsonl", os.fsdecode(b"\xff\xfe.jsonl")], ids=["a key", "a file's name"])
def test_text_that_is_no_utf8_is_printed_and_written(name: str, hand: Write, calls: list[Call], tmp_path: Path) -> None:
    """In a process of its own, whose output is encoded."""
    path = saved(tmp_path, hand(calls) + b'{"\\ud800": 1}\nbroken\n', name)
    for form in ("terminal", "json"):
        command = [sys.executable, "-m", "kvcomm", "analyze", str(path), "--format", form, "--output", str(tmp_path / "new")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"{name.encode(errors='replace').decode()}:13: no known format: an object with ?" in done.stdout


def test_no_verdict_where_sessions_were_forgotten() -> None:
    """A hundred sessions that take turns; one after the other there is a verdict, and sharing is worth it."""
    words = " ".join(f"word{i}" for i in range(50))
    calls = [Call(f"s{i}", a, (Message("user", f"{a} {i} {words}"),), "ok") for a in "abc" for i in range(100)]
    turns, sorted_ = Totals(), Totals()
    for call in calls:
        turns.add(call)
    for call in sorted(calls, key=lambda c: c.session):
        sorted_.add(call)
    assert turns.verdict().startswith("Cannot be told: at 200 of 300 calls the session had been forgotten")
    assert "--session" in turns.verdict()
    assert sorted_.verdict().startswith("Worth it: ")
    assert "Cannot" not in Totals().verdict()


def test_names_cannot_command_a_terminal(hand: Write, tmp_path: Path) -> None:
    text = "a line of twenty words " * 20
    calls = [
        Call("s", name, (Message("user", f"{i} {text}"),), "x")
        for i, name in enumerate(["\x1b[31mred\x07", "b\u202ea\n\x9b2J"])
    ]
    out = terminal(analyze(saved(tmp_path, hand(calls), "\x1b]0;title.jsonl")))
    assert all(line.isprintable() for line in out.split("\n"))
    assert r"\x1b[31mred\x07" in out


@pytest.mark.parametrize("inside", ["", "folder"])
def test_an_output_that_is_a_file(
    inside: str, hand: Write, calls: list[Call], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, hand(calls))
    assert cli.main(["analyze", str(path), "--output", str(path / inside)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{path} is a file; it must be a folder" in err


def test_a_hundred_thousand_messages_of_one_word(hand: Write, tmp_path: Path) -> None:
    messages = tuple(Message("user", "word") for _ in range(100_000))
    doc = analyze(
        saved(tmp_path, hand([Call("s", "a", messages, ""), Call("s", "b", (Message("system", "x"), *messages), "")]))
    )
    assert doc["prompt_tokens"] == 400_002
    assert doc["cross_agent_non_prefix"] == pytest.approx(0.5, abs=0.001)


def test_a_prompt_shorter_than_a_block(hand: Write, tmp_path: Path) -> None:
    doc = analyze(saved(tmp_path, hand([Call("s", a, (Message("user", ""),), "") for a in "ab"])))
    assert (doc["prompt_tokens"], doc["fresh"]) == (2, 1.0)
    assert terminal(doc)
    assert page(doc)


def test_analyze_refuses_before_it_reads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--min-run is 0"):
        analyze(tmp_path / "nowhere", min_run=0)
