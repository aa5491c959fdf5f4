"""A team's calls, written down and read again; a run is what it is without a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import pytest

from kvcomm.agents.agent import Agent
from kvcomm.agents.team import Team, TurnFailed
from kvcomm.agents.topology import chain, debate
from kvcomm.engine import Output
from kvcomm.policy import Rule
from kvcomm.replay.readers import read_trace
from kvcomm.replay.recording.recorder import Recorder
from kvcomm.segments import ReuseReport

if TYPE_CHECKING:
    from tests.replay.recording.conftest import Wire

TEAM = Team(
    (Agent("clerk", role="You are the clerk."), Agent("critic", role="You doubt.", max_new_tokens=7)),
    chain(["clerk", "critic"]),
    rounds=2,
)
REQUEST = {"input": "the facts"}


class Parrot:
    """Says who it is and how long its prompt was."""

    def __init__(self, fails: str = "", together: int = 0) -> None:
        self.fails = fails
        self.concurrent = bool(together)
        self.barrier = Barrier(together or 1, timeout=20)

    def generate(self, messages: Sequence[Mapping[str, str]], /, *, agent: str, rule: Rule, max_new_tokens: int) -> Output:
        self.barrier.wait()
        if agent == self.fails:
            raise OSError("out of paper")
        text = f"{agent} heard {len(messages[-1]['content'])}"
        return Output(text, [1, 2, 3], 5.0, ReuseReport(agent, 40, 30, 10))


def test_a_recorded_team_is_read_again(wire: Wire) -> None:
    """Every turn of the run against every call of the trace, two runs in one file."""
    team = replace(TEAM, record=wire.file)
    runs = [team.run(Parrot(), {"input": text}, session=name) for name, text in (("one", "a"), ("two", "bb"))]
    calls = list(read_trace(wire.file, strict=True))
    assert [(c.session, c.agent) for c in calls] == [(s, a) for s in ("one", "two") for a in ("clerk", "critic") * 2]
    for call, turn in zip(calls, [turn for run in runs for turn in run.turns], strict=True):
        assert [{"role": m.role, "content": m.content} for m in call.messages] == list(turn.messages)
        assert call.output == turn.output.text
    assert runs[0].turns[0].messages == TEAM.run(Parrot(), {"input": "a"}).turns[0].messages
    attributes = wire.spans(wire.file)[1]["attributes"]
    assert {k: v for k, v in attributes.items() if "messages" not in k} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.conversation.id": "one",
        "gen_ai.agent.name": "critic",
        "gen_ai.provider.name": "kvcomm",
        "gen_ai.request.max_tokens": "7",
        "gen_ai.usage.input_tokens": "40",
        "gen_ai.usage.cache_read.input_tokens": "30",
        "gen_ai.usage.output_tokens": "3",
        "gen_ai.response.time_to_first_chunk": 0.005,
    }


def test_every_run_is_a_session_of_its_own(wire: Wire) -> None:
    team = replace(TEAM, record=str(wire.file))
    team.run(Parrot(), REQUEST)
    team.run(Parrot(), REQUEST)
    assert len({span["traceId"] for span in wire.spans(wire.file)}) == 2


def test_agents_side_by_side(wire: Wire) -> None:
    """The record does not put them one after the other."""
    names = ["a", "b", "c"]
    team = Team(tuple(map(Agent, names)), debate(names), record=wire.file)
    team.run(Parrot(together=3), REQUEST)
    assert sorted(span["attributes"]["gen_ai.agent.name"] for span in wire.spans(wire.file)) == names


def test_a_call_that_fails_is_written_and_raised(wire: Wire) -> None:
    with pytest.raises(TurnFailed, match="agent 'critic' failed in round 1 after 1 finished turns: OSError: out of paper"):
        replace(TEAM, record=wire.file).run(Parrot(fails="critic"), REQUEST)
    _, failed = wire.spans(wire.file)
    assert failed["status"] == {"code": 2, "message": "out of paper"}
    assert failed["attributes"]["error.type"] == "OSError"
    assert "gen_ai.output.messages" not in failed["attributes"]


def test_a_recorder_of_ones_own(wire: Wire) -> None:
    """With a redaction, for several teams; it stays open."""
    with Recorder(wire.file, lambda text: text.replace("facts", "[gone]")) as recorder:
        for _ in range(2):
            replace(TEAM, record=recorder).run(Parrot(), REQUEST, rounds=1)
    assert recorder.written == 4
    assert "facts" not in wire.file.read_text()
    assert "the [gone]" in wire.file.read_text()


def test_a_record_that_goes_wrong_is_not_the_runs_fault(caplog: pytest.LogCaptureFixture) -> None:
    run = replace(TEAM, record="/dev/full").run(Parrot(), REQUEST)
    assert [turn.output.text for turn in run.turns] == [turn.output.text for turn in TEAM.run(Parrot(), REQUEST).turns]
    assert caplog.messages == ["recording: /dev/full: No space left on device"]


def test_a_record_that_cannot_be_opened_costs_no_call(tmp_path: Path) -> None:
    parrot = Parrot(fails="clerk")
    with pytest.raises(IsADirectoryError):
        replace(TEAM, record=tmp_path).run(parrot, REQUEST)


def test_an_output_of_another_kind(wire: Wire) -> None:
    """A generator need not return more than a text."""

    class Text:
        text = "so"

    class Plain:
        def generate(self, *args: object, **kwargs: object) -> Any:
            return Text()

    assert replace(TEAM, record=wire.file).run(Plain(), REQUEST).answer == "so"
    assert [call.output for call in read_trace(wire.file)] == ["so"] * 4


def test_nothing_is_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    TEAM.run(Parrot(), REQUEST)
    assert list(tmp_path.iterdir()) == []
    assert replace(TEAM, record="x") == TEAM, "where it is recorded is no part of what a team is"
