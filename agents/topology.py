"""Who hears whom in a team, and who may speak side by side. Names only: knows nothing of agents' prompts or of models.

An edge (speaker, listener) is `within` a round, and then the speaker comes first, or `across` two: the listener hears what the
speaker said in the round before. Of n agents in order:

    kind      within a round                     across rounds
    full      i hears all before it              i hears itself and all after it: from everybody the newest word
    mesh      the same                           everybody hears everybody
    debate    nobody hears anybody               everybody hears everybody
    layered   a layer hears the one before it    the first layer hears the last
    chain     layered, one agent in each: i hears the one before it, the first hears the last
    star      layered, the hub and then the leaves: leaves hear the hub, the hub hears all leaves
    random    each edge of mesh, within and across, with probability p
    custom    as given
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from random import Random
from types import MappingProxyType

from kvcomm.errors import TeamError

__all__ = ["KINDS", "Edge", "Topology", "chain", "custom", "debate", "full", "layered", "mesh", "random", "star"]

Edge = tuple[str, str]
"""(speaker, listener)"""


@dataclass(frozen=True)
class Topology:
    """Raises TeamError for no agents, a name given twice, an unknown name, or a cycle within a round."""

    kind: str
    agents: tuple[str, ...]
    within: frozenset[Edge] = frozenset()
    across: frozenset[Edge] = frozenset()

    def __post_init__(self) -> None:
        if not self.agents:
            raise TeamError("there are no agents; give at least one")
        if twice := sorted({a for a in self.agents if self.agents.count(a) > 1}):
            raise TeamError(f"the name {twice[0]!r} is given to {self.agents.count(twice[0])} agents; give each its own")
        for edge in sorted(self.within | self.across):
            for name in edge:
                if name not in self.agents:
                    raise TeamError(f"edge {edge[0]} -> {edge[1]}: unknown agent {name!r}; there are {', '.join(self.agents)}")
        _ = self.steps

    @cached_property
    def steps(self) -> tuple[tuple[str, ...], ...]:
        """Agents in the order they speak, the same in every round. Those of one step do not hear each other in it."""
        sorter = TopologicalSorter({a: [b for b in self.agents if (b, a) in self.within] for a in self.agents})
        try:
            sorter.prepare()
        except CycleError as e:
            cycle = " -> ".join(e.args[1])
            raise TeamError(f"a cycle within a round: {cycle}; move one of its edges across rounds") from e
        steps = []
        while ready := sorter.get_ready():
            steps.append(tuple(sorted(ready, key=self.agents.index)))
            sorter.done(*ready)
        return tuple(steps)

    def hears(self, round_: int, agent: str) -> tuple[tuple[int, str], ...]:
        """(round, speaker) of everything that `agent` hears when it speaks in `round_`, counted from 1; oldest first."""
        if agent not in self.agents or round_ < 1:
            raise TeamError(f"agent {agent!r} in round {round_}: rounds count from 1, agents are {', '.join(self.agents)}")
        before = [(round_ - 1, a) for a in self.agents if round_ > 1 and (a, agent) in self.across]
        return (*before, *((round_, a) for a in self.agents if (a, agent) in self.within))


def full(names: Sequence[str]) -> Topology:
    """Fully connected: everybody has heard the newest word of everybody."""
    return Topology("full", tuple(names), _forward(names), _all(names) - _forward(names))


def mesh(names: Sequence[str]) -> Topology:
    """Everybody hears all before it, and the whole round before."""
    return Topology("mesh", tuple(names), _forward(names), _all(names))


def debate(names: Sequence[str]) -> Topology:
    """All speak at once, then answer to what was said; one round of it is a vote."""
    return Topology("debate", tuple(names), frozenset(), _all(names))


def layered(names: Sequence[str], layers: Iterable[Iterable[str]]) -> Topology:
    """Raises TeamError unless `layers` are lists that hold each of `names` once."""
    rows = [row for row in _rows("layers", layers) if row]
    if sorted(placed := [a for row in rows for a in row]) != sorted(names):
        raise TeamError(f"the layers hold {', '.join(placed)}; they must hold each of {', '.join(names)} once")
    within = {(a, b) for here, after in pairwise(rows) for a in here for b in after}
    across = {(a, b) for a in rows[-1] for b in rows[0]} if rows else set()
    return Topology("layered", tuple(names), frozenset(within), frozenset(across))


def chain(names: Sequence[str]) -> Topology:
    """Each hears the one before it."""
    return replace(layered(names, [[name] for name in names]), kind="chain")


def star(names: Sequence[str], hub: str | None = None) -> Topology:
    """The hub speaks first, by default the first agent. For a hub that speaks last, take `layered`."""
    if hub is not None and hub not in names:
        raise TeamError(f"the hub is {hub!r}; it must be one of {', '.join(names)}")
    at = 0 if hub is None else list(names).index(hub)
    return replace(layered(names, [names[at : at + 1], [*names[:at], *names[at + 1 :]]]), kind="star")


def random(names: Sequence[str], p: float = 0.5, seed: int = 0) -> Topology:
    """The same for the same arguments. Raises TeamError unless 0 <= p <= 1."""
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise TeamError(f"p is {p!r}; it is a probability, 0 to 1")
    if type(seed) is not int:
        raise TeamError(f"seed is {seed!r}; it must be a whole number")
    rng = Random(seed)
    pairs = [(a, b) for a in names for b in names]
    within = frozenset(edge for edge in pairs if rng.random() < p) & _forward(names)
    return Topology("random", tuple(names), within, frozenset(edge for edge in pairs if rng.random() < p))


def custom(names: Sequence[str], within: Iterable[Iterable[str]] = (), across: Iterable[Iterable[str]] = ()) -> Topology:
    """Edges as given, each a pair [speaker, listener]."""
    edges = {"within": _rows("within", within), "across": _rows("across", across)}
    for what, rows in edges.items():
        if wrong := [row for row in rows if len(row) != 2]:
            raise TeamError(f"{what} has {list(wrong[0])}; an edge is a pair of names, [speaker, listener]")
    return Topology("custom", tuple(names), *(frozenset((row[0], row[1]) for row in rows) for rows in edges.values()))


KINDS: Mapping[str, Callable[..., Topology]] = MappingProxyType(
    {f.__name__: f for f in (full, mesh, debate, layered, chain, star, random, custom)}
)
"""Every builder by its name; the first argument is the agents' names in order."""


def _forward(names: Sequence[str]) -> frozenset[Edge]:
    return frozenset((a, b) for i, a in enumerate(names) for b in names[i + 1 :])


def _all(names: Sequence[str]) -> frozenset[Edge]:
    return frozenset((a, b) for a in names for b in names)


def _rows(what: str, rows: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """Lists of names, as a file or a caller gave them."""
    if not isinstance(rows, Iterable) or any(isinstance(row, str) or not isinstance(row, Iterable) for row in rows):
        raise TeamError(f"{what} is {rows!r}; it must be a list of lists of names")
    found = [tuple(row) for row in rows]
    if wrong := [name for row in found for name in row if not isinstance(name, str)]:
        raise TeamError(f"{what} has {wrong[0]!r}; a name is text, so put it in quotes")
    return found
