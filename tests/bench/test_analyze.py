"""The benchmark of analyze, small: the made-up trace is one, and the columns are what they say. Speed itself is not tested."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from kvcomm.bench import analyze
from kvcomm.errors import InputError

SMALL = "--sessions 3 --factor 2 --words 20".split()


def run(*flags: str, output: Path | None = None, form: str = "json") -> int:
    parser = argparse.ArgumentParser()
    parser.set_defaults(format=form, output=output, quiet=True)
    analyze.add_arguments(parser)
    return analyze.run(parser.parse_args([*SMALL, *flags]))


def test_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(output=tmp_path / "new") == 0
    doc = json.loads(capsys.readouterr().out)
    assert doc == json.loads((tmp_path / "new" / "analyze.json").read_text())
    short, long = doc["traces"]
    assert [t["sessions"] for t in (short, long)] == [3, 6]
    assert [t["calls"] for t in (short, long)] == [48, 96]
    assert 1.5 < long["prompt_tokens"] / short["prompt_tokens"] < 2.5
    for t in (short, long):
        assert t["cross_agent_non_prefix"] > 0.2
        assert t["prompt_tokens_per_s"] == pytest.approx(t["prompt_tokens"] / t["s"])
        assert t["peak_memory_bytes"] > 10 << 20
    assert doc["memory_of_longer_over_shorter"] == long["peak_memory_bytes"] / short["peak_memory_bytes"]


def test_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(form="terminal") == 0
    assert "2 times the trace takes" in capsys.readouterr().out


def test_sessions_are_interleaved() -> None:
    names = [call["session_id"] for call in analyze.trace(5, 5, 0)]
    assert names[:5] == ["session-0", "session-1", "session-2", "session-3", "session-0"]
    assert sorted(set(names)) == [f"session-{i}" for i in range(5)]
    assert len(names) == 5 * 16


@pytest.mark.parametrize("flag", ["--sessions", "--factor", "--words"])
def test_unusable_flags(flag: str) -> None:
    with pytest.raises(InputError, match=f"{flag} is 0"):
        run(flag, "0")
