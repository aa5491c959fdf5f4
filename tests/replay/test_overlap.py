"""What of a prompt was there before: hashed windows, beside comparing every token with every other."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.replay.analysis.overlap import BLOCK, Session
from kvcomm.replay.analysis.seen import Seen, grams
from kvcomm.replay.analysis.tokens import PRE_TOKEN, Text, Tokens, mixed
from kvcomm.replay.analysis.totals import Totals
from kvcomm.replay.calls import Call, Message
from kvcomm.replay.readers import read_trace

Chat = Callable[..., list[Call]]


def in_common(prompt: Sequence[object], text: Sequence[object], at_least: int) -> set[int]:
    """Places in the prompt that belong to a run of so many tokens that is also in the text; one diagonal after the other."""
    found: set[int] = set()
    for shift in range(-len(text) + 1, len(prompt)):
        run = 0
        for i in range(max(0, shift), min(len(prompt), len(text) + shift) + 1):
            if i < min(len(prompt), len(text) + shift) and prompt[i] == text[i - shift]:
                run += 1
            else:
                if run >= at_least:
                    found |= set(range(i - run, i))
                run = 0
    return found


def brute_force(calls: Sequence[tuple[str, list[object], list[object]]], min_run: int) -> list[tuple[int, int, int, int, int]]:
    """(prefix, prefix with others, cross, own, fresh) of calls (agent, prompt, output) of one session."""
    out = []
    for i, (agent, prompt, _) in enumerate(calls):
        shared = {True: 0, False: 0}  # by whether it is the agent's own
        for who, other, _ in calls[:i]:
            same = next(
                (n for n, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), min(len(prompt), len(other))
            )
            shared[who == agent] = max(shared[who == agent], same // BLOCK * BLOCK)
        prefix = max(shared.values())
        rest = prompt[prefix:]
        seen: dict[bool, set[int]] = {True: set(), False: set()}
        for who, other, output in calls[:i]:
            for text in (other, output):
                seen[who == agent] |= in_common(rest, text, min_run)
        cross, own = seen[False], seen[True] - seen[False]
        out.append((prefix, shared[False], len(cross), len(own), len(rest) - len(cross) - len(own)))
    return out


def text(numbers: Sequence[int]) -> Text:
    ids = mixed(np.array([0, *numbers], dtype=np.uint64))
    return Text(ids, hash(tuple(numbers)) % (1 << 64))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), min_run=st.sampled_from([2, 3, 5, 8, 16, 21]))
def test_every_class_is_what_brute_force_finds(seed: int, min_run: int) -> None:
    """Session.add against `brute_force`, on prompts pasted together from few pieces of few tokens: many partial repetitions."""
    rng = random.Random(seed)
    pieces = [[rng.randrange(1, 6) for _ in range(rng.randrange(1, 45))] for _ in range(6)]
    session = Session(min_run)
    calls: list[tuple[str, list[object], list[object]]] = []
    found = []
    for _ in range(7):
        agent = rng.choice("abcd")
        messages = [rng.choice(pieces)[rng.randrange(3) :] for _ in range(rng.randrange(5))]
        output = rng.choice(pieces)
        result = session.add(agent, [text(m) for m in messages], text(output))
        calls.append((agent, [x for m in messages for x in ("start", *m)], list(output)))
        found.append((result.prefix, result.prefix_other, result.cross, result.own, result.fresh))
        assert sum(result.sources.values()) == result.cross
        assert agent not in result.sources
        assert result.whole_messages <= result.cross
    assert found == brute_force(calls, min_run)


def words(calls: Sequence[Call]) -> list[tuple[str, list[object], list[object]]]:
    """As the estimate counts, but as strings."""
    return [
        (
            c.agent,
            [x for m in c.messages for x in (("role", m.role), *PRE_TOKEN.findall(m.content))],
            list(PRE_TOKEN.findall(c.output)),
        )
        for c in calls
    ]


def test_a_group_chat_in_text(chat: Chat) -> None:
    """From text to classes: Totals against `brute_force` on the same pre-tokens."""
    calls = chat("s", random.Random(5), rounds=9, agents=3, words=30)
    totals = Totals()
    overlaps = [totals.add(c) for c in calls]
    expected = brute_force(words(calls), 16)
    assert [(o.prefix, o.prefix_other, o.cross, o.own, o.fresh) for o in overlaps] == expected
    assert totals.all.cross == sum(e[2] for e in expected) > 0.1 * totals.all.tokens


def test_another_way_to_count_gives_nearly_the_same(chat: Chat) -> None:
    """Within 2 points of brute force over words at white space, and over runs that may begin inside the prefix."""
    calls = chat("s", random.Random(6), rounds=6, agents=3, words=120)
    totals = Totals()
    for c in calls:
        totals.add(c)
    split = [
        (c.agent, list[object](x for m in c.messages for x in m.content.split()), list[object](c.output.split())) for c in calls
    ]
    prefixes = [prefix for prefix, *_ in brute_force(split, 16)]
    cross = tokens = 0
    for i, (agent, prompt, _) in enumerate(split):
        earlier = [t for who, before, output in split[:i] if who != agent for t in (before, output)]
        seen = set[int]().union(*(in_common(prompt, t, 16) for t in earlier))
        cross += sum(place >= prefixes[i] for place in seen)
        tokens += len(prompt)
    assert totals.share(totals.all.cross) == pytest.approx(cross / tokens, abs=0.02)


def test_recorded_runs_are_what_brute_force_finds(recorded: Path) -> None:
    """The shortest session of each trace in KVCOMM_TRACES, or of a made-up one."""
    for path in sorted(recorded.rglob("calls.jsonl")):
        sessions: dict[str, list[Call]] = {}
        for call in read_trace(path, strict=True):
            sessions.setdefault(call.session, []).append(call)
        calls = min(
            (s for s in sessions.values() if len(s) > 1), key=lambda s: sum(len(m.content) for c in s for m in c.messages)
        )
        totals = Totals()
        got = [totals.add(c) for c in calls[:4]]
        assert [(o.prefix, o.prefix_other, o.cross, o.own, o.fresh) for o in got] == brute_force(words(calls[:4]), 16)


def test_fewer_are_found_the_longer_a_run_must_be(chat: Chat) -> None:
    calls = [c for s in range(3) for c in chat(f"s{s}", random.Random(s), rounds=8, agents=3, words=25 + 30 * s)]
    found = []
    for min_run in (2, 4, 8, 16, 23, 32, 64, 100, 256):
        totals = Totals(min_run=min_run)
        for c in calls:
            totals.add(c)
        found.append(totals.all.cross)
        assert all(totals.by_length[a] >= totals.by_length[b] for a in totals.by_length for b in totals.by_length if a < b)
    assert found == sorted(found, reverse=True)
    assert found[0] > found[4] > found[-1]


def test_coarser_lengths_are_what_they_would_find_alone(chat: Chat) -> None:
    calls = chat("s", random.Random(1), rounds=8, agents=3, words=90)
    fine = Totals(min_run=16)
    for c in calls:
        fine.add(c)
    for length in (64, 256):
        coarse = Totals(min_run=length)
        for c in calls:
            coarse.add(c)
        assert fine.by_length[length] == coarse.all.cross


def test_a_few_tokens_by_hand() -> None:
    """b reads what a read and said; a reads its own words in another place."""
    session = Session(4)
    shared, said, fresh = list(range(10, 30)), list(range(30, 40)), list(range(50, 60))
    first = session.add("a", [text([1, 2]), text(shared)], text(said))
    assert (first.tokens, first.fresh, first.runs) == (24, 24, ())
    second = session.add("b", [text([7]), text(shared), text(said)], text(fresh))
    assert second.sources == {"a": 21 + 10}  # with the token that begins the message; the output has none
    assert second.runs == (21, 10)
    assert (second.prefix, second.own, second.fresh) == (0, 0, 3)
    assert second.whole_messages == 30
    third = session.add("a", [text([3]), text(said)], text([]))
    assert (third.cross, third.own, third.sources) == (11, 0, {"b": 11})  # b has it too, with the beginning of the message
    fourth = session.add("b", [text([7]), text(shared)], text([]))
    assert (fourth.prefix, fourth.prefix_own, fourth.prefix_other, fourth.tokens) == (16, 16, 0, 23)


def test_the_table_knows_the_first_two(chat: Chat) -> None:
    """Seen against a dict, while it grows from nothing; hash 0 included."""
    rng = np.random.default_rng(0)
    table, known = Seen(), dict[int, list[int]]()
    values = np.concatenate([[0], rng.integers(0, 1 << 63, 5000)]).astype(np.uint64)
    for agent in (3, 1, 3, 2, 5):
        some = rng.choice(values, 2500)
        table.add(some, agent)
        for value in some.tolist():
            if agent not in known.setdefault(value, []):
                known[value].append(agent)
    first, second = table.holders(values)
    for value, a, b in zip(values.tolist(), first.tolist(), second.tolist(), strict=True):
        assert [a, b] == [*known.get(value, []), 0, 0][:2]
    assert len(table) == len(known)


def test_equal_keys_of_a_crowded_slot() -> None:
    values = (np.arange(200, dtype=np.uint64) << np.uint64(40)) + np.uint64(7)  # all want slot 7
    table = Seen()
    table.add(np.concatenate([values, values]), 1)
    assert len(table) == 200
    assert table.holders(values)[0].tolist() == [1] * 200


@pytest.mark.parametrize("lengths", [(1,), (2, 3), (7, 16, 64), (5, 256)])
def test_grams_are_equal_where_the_tokens_are(lengths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    ids = mixed(rng.integers(0, 2, 300).astype(np.uint64))
    for length, hashes in zip(lengths, grams(ids, lengths), strict=True):
        assert len(hashes) == max(0, 300 - length + 1)
        windows = [tuple(ids[i : i + length].tolist()) for i in range(len(hashes))]
        assert len(set(windows)) == len(set(hashes.tolist())) == len(set(zip(windows, hashes.tolist(), strict=True)))


@pytest.mark.parametrize(
    ("said", "tokens"),
    [
        ("The agents read the same text.", ["The", " agents", " read", " the", " same", " text", "."]),
        ("def f(x):\n    return x_1 + 12345", None),
        ("漢字かな交じり文", ["漢", "字", "か", "な", "交", "じ", "り", "文"]),
        ("a\u00e9\U0001f600\t\t\n\n  x___y \x00", None),
        ("", []),
    ],
)
def test_the_estimate_loses_no_character(said: str, tokens: list[str] | None) -> None:
    found = PRE_TOKEN.findall(said)
    assert "".join(found) == said
    assert tokens is None or found == tokens
    assert len(Tokens().of(Message("user", said)).content) == len(found)


@settings(max_examples=50)
@given(st.text())
def test_the_estimate_loses_no_character_of_any_text(said: str) -> None:
    assert "".join(PRE_TOKEN.findall(said)) == said


def test_what_is_forgotten(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions beyond the bound are over; one that alone is too large is begun anew, and that is counted."""
    calls = [c for s in range(5) for c in chat(f"s{s}", random.Random(s))]
    monkeypatch.setattr("kvcomm.replay.analysis.totals.OPEN", 2)
    totals = Totals()
    for c in calls:
        totals.add(c)
    assert (totals.sessions, totals.forgotten) == (5, 0)
    monkeypatch.setattr("kvcomm.replay.analysis.totals.KNOWN_BYTES", 1000)
    small = Totals()
    for c in calls:
        small.add(c)
    assert small.sessions == 5
    assert small.forgotten == len(calls) - 5
    assert small.all.cross == 0 < totals.all.cross


def test_names_beyond_the_bound_are_one(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcomm.replay.analysis.totals.NAMES", 2)
    totals = Totals()
    for c in chat("s", random.Random(0), rounds=8, agents=5):
        totals.add(c)
    assert set(totals.agents) == {"agent-0", "agent-1", "(others)"}
    assert sum(a.tokens for a in totals.agents.values()) == totals.all.tokens
    assert sum(totals.pairs.values()) == totals.all.cross


def verdict(prefix: int, cross: int, fresh: int, agents: int = 2) -> str:
    totals = Totals()
    totals.all.calls, totals.all.tokens, totals.all.prefix, totals.all.cross = 10, prefix + cross + fresh, prefix, cross
    for i in range(agents):
        totals.agents[str(i)] = totals.all
    return totals.verdict()


def test_verdicts() -> None:
    assert verdict(42, 35, 23).startswith("Worth it: 35 % of all prompt tokens (4 tokens per call)")
    assert verdict(42, 35, 23).endswith("which is 60 % of what a prefix cache still has to prefill.")
    assert verdict(80, 10, 10).startswith("Worth a try: 10 %")
    assert verdict(89, 3, 8).startswith("Not worth it: 89 % is prefix-shareable already, and only 3 %")
    assert verdict(10, 2, 88).startswith("Not worth it: 88 % is new to its session")
    assert verdict(89, 0, 11, agents=1).startswith("Not worth it: there is one agent")
