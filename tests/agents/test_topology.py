"""Who hears whom, against tables written out by hand for five agents, and laws for random graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.agents import topology as t
from kvcomm.errors import TeamError

NAMES = tuple("abcde")

# Per topology: the steps of a round, what each agent hears in round 1, and what in round 2. "1a" is what a said in round 1.
HEARD: Mapping[str, tuple[Callable[[], t.Topology], str, Mapping[str, str], Mapping[str, str]]] = {
    "full": (
        lambda: t.full(NAMES),
        "a b c d e",
        {"a": "", "b": "1a", "c": "1a 1b", "d": "1a 1b 1c", "e": "1a 1b 1c 1d"},
        {
            "a": "1a 1b 1c 1d 1e",
            "b": "1b 1c 1d 1e 2a",
            "c": "1c 1d 1e 2a 2b",
            "d": "1d 1e 2a 2b 2c",
            "e": "1e 2a 2b 2c 2d",
        },
    ),
    "mesh": (
        lambda: t.mesh(NAMES),
        "a b c d e",
        {"a": "", "b": "1a", "c": "1a 1b", "d": "1a 1b 1c", "e": "1a 1b 1c 1d"},
        {
            "a": "1a 1b 1c 1d 1e",
            "b": "1a 1b 1c 1d 1e 2a",
            "c": "1a 1b 1c 1d 1e 2a 2b",
            "d": "1a 1b 1c 1d 1e 2a 2b 2c",
            "e": "1a 1b 1c 1d 1e 2a 2b 2c 2d",
        },
    ),
    "debate": (lambda: t.debate(NAMES), "abcde", dict.fromkeys(NAMES, ""), dict.fromkeys(NAMES, "1a 1b 1c 1d 1e")),
    "chain": (
        lambda: t.chain(NAMES),
        "a b c d e",
        {"a": "", "b": "1a", "c": "1b", "d": "1c", "e": "1d"},
        {"a": "1e", "b": "2a", "c": "2b", "d": "2c", "e": "2d"},
    ),
    "star": (
        lambda: t.star(NAMES),
        "a bcde",
        {"a": "", "b": "1a", "c": "1a", "d": "1a", "e": "1a"},
        {"a": "1b 1c 1d 1e", "b": "2a", "c": "2a", "d": "2a", "e": "2a"},
    ),
    "star around c": (
        lambda: t.star(NAMES, hub="c"),
        "c abde",
        {"a": "1c", "b": "1c", "c": "", "d": "1c", "e": "1c"},
        {"a": "2c", "b": "2c", "c": "1a 1b 1d 1e", "d": "2c", "e": "2c"},
    ),
    "layered": (
        lambda: t.layered(NAMES, [["a", "b"], ["c", "d"], ["e"]]),
        "ab cd e",
        {"a": "", "b": "", "c": "1a 1b", "d": "1a 1b", "e": "1c 1d"},
        {"a": "1e", "b": "1e", "c": "2a 2b", "d": "2a 2b", "e": "2c 2d"},
    ),
    "custom": (
        lambda: t.custom(NAMES, within=[["e", "a"], ["c", "a"], ["a", "d"]], across=[["d", "e"], ["b", "b"]]),
        "bce a d",
        {"a": "1c 1e", "b": "", "c": "", "d": "1a", "e": ""},
        {"a": "2c 2e", "b": "1b", "c": "", "d": "2a", "e": "1d"},
    ),
    "random, never": (lambda: t.random(NAMES, p=0.0), "abcde", dict.fromkeys(NAMES, ""), dict.fromkeys(NAMES, "")),
    "random, always": (
        lambda: t.random(NAMES, p=1.0),
        "a b c d e",
        {"a": "", "b": "1a", "c": "1a 1b", "d": "1a 1b 1c", "e": "1a 1b 1c 1d"},
        {
            "a": "1a 1b 1c 1d 1e",
            "b": "1a 1b 1c 1d 1e 2a",
            "c": "1a 1b 1c 1d 1e 2a 2b",
            "d": "1a 1b 1c 1d 1e 2a 2b 2c",
            "e": "1a 1b 1c 1d 1e 2a 2b 2c 2d",
        },
    ),
}


@pytest.mark.parametrize("name", HEARD)
def test_who_hears_whom(name: str) -> None:
    """`hears` and `steps` against the table above; later rounds are like the second."""
    build, steps, *rounds = HEARD[name]
    topology = build()
    assert topology.steps == tuple(tuple(step) for step in steps.split())
    for round_, expected in enumerate(rounds, 1):
        for agent in NAMES:
            assert " ".join(f"{r}{who}" for r, who in topology.hears(round_, agent)) == expected[agent], (round_, agent)
    for agent in NAMES:
        assert topology.hears(7, agent) == tuple((r + 5, who) for r, who in topology.hears(2, agent))


@pytest.mark.parametrize("kind", [k for k in t.KINDS if k != "layered"])
def test_kind_is_the_builder_and_one_agent_hears_nobody_at_first(kind: str) -> None:
    topology = t.KINDS[kind](("solo",))
    assert topology.kind == kind
    assert topology.steps == (("solo",),)
    assert topology.hears(1, "solo") == ()
    assert set(topology.hears(2, "solo")) <= {(1, "solo")}


names = st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=8, unique=True).map(tuple)


@given(names, st.floats(0, 1), st.integers())
def test_random_laws(names: tuple[str, ...], p: float, seed: int) -> None:
    """The same for the same seed; edges only forward; steps are a partition in which everybody heard has spoken before."""
    topology = t.random(names, p=p, seed=seed)
    assert topology == t.random(names, p=p, seed=seed)
    assert all(names.index(a) < names.index(b) for a, b in topology.within)
    assert sorted(a for step in topology.steps for a in step) == sorted(names)
    spoken: set[tuple[int, str]] = set()
    for round_ in (1, 2, 3):
        for step in topology.steps:
            for agent in step:
                heard = topology.hears(round_, agent)
                assert set(heard) <= spoken
                assert list(heard) == sorted(heard, key=lambda turn: (turn[0], names.index(turn[1])))
            spoken |= {(round_, agent) for agent in step}


@given(names.filter(lambda n: len(n) > 1), st.data())
def test_custom_edges_have_an_order_or_a_cycle_is_named(names: tuple[str, ...], data: st.DataObject) -> None:
    """Against the closure of the edges: a cycle is reported if and only if somebody can reach itself."""
    pairs = data.draw(st.sets(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=12))
    reach = set(pairs)
    while more := {(a, d) for a, b in reach for c, d in reach if b == c} - reach:
        reach |= more
    if any(a == b for a, b in reach):
        with pytest.raises(TeamError, match="a cycle within a round"):
            t.custom(names, within=pairs)
    else:
        order = [agent for step in t.custom(names, within=pairs).steps for agent in step]
        assert all(order.index(a) < order.index(b) for a, b in reach)


def test_random_hits_its_probability() -> None:
    """Edges over 300 seeds, against p times the pairs: 10 forward and 25 across for five agents."""
    drawn = [t.random(NAMES, p=0.3, seed=seed) for seed in range(300)]
    assert 0.25 < sum(len(d.within) for d in drawn) / (300 * 10) < 0.35
    assert 0.25 < sum(len(d.across) for d in drawn) / (300 * 25) < 0.35
    assert len({(d.within, d.across) for d in drawn}) > 250


def test_a_cycle_is_spelled_out() -> None:
    with pytest.raises(TeamError, match=r"a cycle within a round: b -> c -> d -> b; move one of its edges across rounds"):
        t.custom(NAMES, within=[["a", "b"], ["b", "c"], ["c", "d"], ["d", "b"]])
    with pytest.raises(TeamError, match="a -> a"):
        t.custom(NAMES, within=[["a", "a"]])
    assert t.custom(NAMES, across=[["a", "b"], ["b", "a"]]).hears(2, "a") == ((1, "b"),)  # across rounds it is none


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: t.full([]), "no agents; give at least one"),
        (lambda: t.chain([]), "no agents; give at least one"),
        (lambda: t.star([]), "no agents; give at least one"),
        (lambda: t.random([]), "no agents; give at least one"),
        (lambda: t.mesh(["a", "b", "a"]), "the name 'a' is given to 2 agents; give each its own"),
        (lambda: t.star(["a", "a"]), "the name 'a' is given to 2 agents"),
        (lambda: t.star(NAMES, hub="z"), "the hub is 'z'; it must be one of a, b, c, d, e"),
        (lambda: t.custom(NAMES, within=[["a", "z"]]), "edge a -> z: unknown agent 'z'; there are a, b, c, d, e"),
        (lambda: t.custom(NAMES, across=[["z", "a"]]), "unknown agent 'z'"),
        (lambda: t.custom(NAMES, within=[["a", "b", "c"]]), r"within has \['a', 'b', 'c'\]; an edge is a pair"),
        (lambda: t.custom(NAMES, within=["ab"]), "list of lists of names"),
        (lambda: t.custom(NAMES, across=7), "across is 7"),  # type: ignore[arg-type]  # what a file may hold
        (lambda: t.custom(NAMES, across=[["a", 1]]), "a name is text"),  # type: ignore[list-item]  # what a file may hold
        (lambda: t.layered(NAMES, [["a", "b"], ["c", "d"]]), "hold a, b, c, d; they must hold each of a, b, c, d, e once"),
        (lambda: t.layered(NAMES, [[*NAMES], ["a"]]), "they must hold each of"),
        (lambda: t.layered(NAMES, "abcde"), "list of lists of names"),
        (lambda: t.random(NAMES, p=1.5), "p is 1.5; it is a probability, 0 to 1"),
        (lambda: t.random(NAMES, p=float("nan")), "p is nan"),
        (lambda: t.random(NAMES, p="0.5"), "p is '0.5'"),  # type: ignore[arg-type]  # what a file may hold
        (lambda: t.random(NAMES, seed="x"), "seed is 'x'"),  # type: ignore[arg-type]  # what a file may hold
        (lambda: t.full(NAMES).hears(0, "a"), "rounds count from 1"),
        (lambda: t.full(NAMES).hears(1, "z"), "agent 'z'"),
    ],
)
def test_what_cannot_be_run_says_so(build: Callable[[], object], says: str) -> None:
    with pytest.raises(TeamError, match=says):
        build()
