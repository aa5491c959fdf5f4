"""Who reads whom: against a search of every message for every output, and the cases in which text alone does not tell."""

from __future__ import annotations

import random

import pytest

from kvcomm.replay.calls import Call, Message
from kvcomm.replay.graph import LEAST, order, rewritten

LONG = "the answer is forty-two, as everybody knows"


def call(
    session: str, agent: str, texts: list[str], output: str, started: float | None = None, ended: float | None = None
) -> Call:
    return Call(session, agent, tuple(Message("user", text) for text in texts), output, started=started, ended=ended)


def sources(calls: list[Call]) -> list[list[int]]:
    return [[read.source for read in turn.reads] for turn in order(calls)]


def test_reads_are_those_of_a_search_for_everything(calls: list[Call]) -> None:
    """Quadratic: every output of the session so far in every message. The outputs of the made-up runs all differ."""
    turns = order(calls)
    assert [turn.call for turn in turns] == calls
    for turn in turns:
        before = [t for t in turns[: turn.number] if t.call.session == turn.call.session]
        wanted = sorted(
            (i, t.number) for i, m in enumerate(turn.call.messages) for t in before if t.call.output.strip() in m.content
        )
        assert sorted((read.message, read.source) for read in turn.reads) == wanted
        for read in turn.reads:
            assert turn.call.messages[read.message].content[read.start : read.end] == turns[read.source].call.output.strip()
    assert [turn.hop for turn in turns if turn.call.session == "one"] == list(range(6))


@pytest.mark.parametrize("seed", range(5))
def test_outputs_inside_of_messages(seed: int) -> None:
    """Outputs pasted with text around them, several in one message, against str.find from left to right."""
    rng = random.Random(seed)
    outputs = [f"output number {i} " + "x" * rng.randrange(20) + " ends" for i in range(6)]
    calls = [call("s", "a", ["start"], output) for output in outputs]
    pasted = rng.sample(outputs, 4)
    text = " | ".join(f"{rng.random()} {output} {rng.random()}" for output in pasted)
    turn = order([*calls, call("s", "b", [text], "")])[-1]
    assert [read.source for read in turn.reads] == [outputs.index(output) for output in pasted]
    assert [read.start for read in turn.reads] == [text.find(output) for output in pasted]
    assert turn.hop == 1


def test_short_outputs_count_where_they_are_whole_messages() -> None:
    assert len("yes") < LEAST
    assert sources([call("s", "a", ["?"], "yes"), call("s", "b", ["he said yes"], ""), call("s", "c", [" yes\n"], "")]) == [
        [],
        [],
        [0],
    ]


def test_sessions_know_nothing_of_each_other() -> None:
    assert sources([call("s", "a", ["?"], LONG), call("t", "b", [LONG], "")]) == [[], []]


def test_time_decides_where_it_is_known() -> None:
    late, early = call("s", "late", [LONG], "b", 5.0, 6.0), call("s", "early", ["?"], LONG, 1.0, 2.0)
    turns = order([late, early])
    assert [turn.call.agent for turn in turns] == ["early", "late"]
    assert [read.source for read in turns[1].reads] == [0]
    side_by_side = call("s", "other", [LONG], "b", 1.5, 3.0)  # began before the other had ended
    assert sources([early, side_by_side]) == [[], []]
    untimed = Call("s", "c", (Message("user", LONG),), "")
    assert sources([early, late, untimed]) == [[], [0], [0]]  # as they stand in the trace


def test_of_equal_outputs_the_nearest_in_time() -> None:
    first, second = call("s", "a", ["1"], LONG), call("s", "b", ["2"], LONG)
    assert sources([first, second, call("s", "c", [LONG], "")])[2] == [1]
    assert sources([first, second, call("s", "c", [LONG, LONG], "")])[2] == [0, 1]


def test_an_output_is_not_read_where_the_text_stood_before_it_was_said() -> None:
    asked = call("s", "a", [LONG], LONG)  # repeats what it was told
    assert sources([asked, call("s", "b", [LONG], "")]) == [[], []]


def test_rewritten() -> None:
    text = f"first: {LONG}. second: {LONG * 2}"
    calls = [call("s", "a", ["1"], LONG), call("s", "b", ["2"], LONG * 2), call("s", "c", [text, "else"], "")]
    turn = order(calls)[2]
    assert [m.content for m in rewritten(turn, {0: " new\n", 1: "other"})] == ["first: new. second: other", "else"]
    assert rewritten(turn, {}) == turn.call.messages


def test_many_messages() -> None:
    one = call("s", "a", ["x"] * 100_000, LONG)
    turns = order([one, call("s", "b", [*["x"] * 100_000, LONG], "")])
    assert [read.source for read in turns[1].reads] == [0]
