"""What of a prompt the session had before, and where: at its beginning, in another agent's text, in the agent's own, nowhere.

Every token of a prompt is in exactly one class, the first that fits:

    prefix   in the longest beginning, in blocks of 16 tokens, that an earlier prompt of the session has too, whoever's
    cross    in a run of `min_run` tokens or more that stood in another agent's earlier prompt or output, at any place
    own      in such a run of the agent's own earlier prompts and outputs
    fresh    the rest

A token is in a run of n or more common tokens exactly when a window of n tokens around it is common, so windows are all that
is kept. Runs lie behind the prefix. Knows nothing of tokenizers and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvcomm.replay.analysis.seen import Agents, Seen, grams
from kvcomm.replay.analysis.tokens import Hashes, Text, mixed, sums

__all__ = ["BLOCK", "COARSE", "MIN_RUN", "Overlap", "Session"]

BLOCK = 16  # tokens of a block of a prefix cache
MIN_RUN = 16
COARSE = (64, 256)  # lengths of runs, beside min_run, at which it is told what would have been found
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Overlap:
    """One call, in tokens."""

    tokens: int
    prefix: int
    prefix_own: int  # the longest beginning shared with a call of its own
    prefix_other: int  # the same, of other agents
    cross: int
    own: int
    runs: tuple[int, ...]  # lengths of the stretches that other agents had, every window of them
    sources: dict[str, int]  # of the tokens of `cross`, by who had them first; another than the reader
    cross_by_length: dict[int, int]  # the same as `cross` with other lengths of run
    whole_messages: int  # of messages, not in the prefix, that another agent had word for word

    @property
    def fresh(self) -> int:
        return self.tokens - self.prefix - self.cross - self.own


@dataclass
class Session:
    """What the agents of one session had so far. Mutable."""

    min_run: int = MIN_RUN
    agents: dict[str, int] = field(default_factory=dict)  # numbered from 1

    def __post_init__(self) -> None:
        self.lengths = tuple(sorted({self.min_run, *(n for n in COARSE if n > self.min_run)}))
        self._runs = {n: Seen() for n in self.lengths}
        self._prefixes, self._messages = Seen(), Seen()

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in (*self._runs.values(), self._prefixes, self._messages))

    def add(self, agent: str, messages: Sequence[Text], output: Text) -> Overlap:
        """Compares a call's messages with all before it, then keeps them and the output."""
        me = self.agents.setdefault(agent, len(self.agents) + 1)
        ids = np.concatenate([m.ids for m in messages]) if messages else np.empty(0, dtype=np.uint64)
        prefixes = _prefixes(ids)
        whose = self._prefixes.holders(prefixes)
        mine, _ = self._prefixes.holders(_signed(prefixes, me))
        prefix, prefix_own, prefix_other = (BLOCK * _leading(f) for f in (whose[0] != 0, mine != 0, _others(whose, me) != 0))
        cross: dict[int, Flags] = {}
        sources: dict[str, int] = {}
        runs: tuple[int, ...] = ()
        own = np.zeros(len(ids) - prefix, dtype=np.bool_)
        for length, windows in zip(self.lengths, grams(ids[prefix:], self.lengths), strict=True):
            holders = self._runs[length].holders(windows)
            other = _others(holders, me)
            cross[length] = _covered(other != 0, length, len(own))
            if length == self.min_run:
                own = _covered((holders[0] == me) | (holders[1] == me), length, len(own)) & ~cross[length]
                runs = tuple(_stretches(other != 0, length))
                sources = self._named(other, cross[length])
        result = Overlap(
            tokens=len(ids),
            prefix=prefix,
            prefix_own=prefix_own,
            prefix_other=prefix_other,
            cross=int(cross[self.min_run].sum()),
            own=int(own.sum()),
            runs=runs,
            sources=sources,
            cross_by_length={n: int(flags.sum()) for n, flags in cross.items()},
            whole_messages=self._whole(messages, prefix, me, output),
        )
        self._keep(ids, output.content, prefixes, prefix_own, me)
        return result

    def _keep(self, ids: Hashes, output: Hashes, prefixes: Hashes, known: int, me: int) -> None:
        """All but what is inside the first `known` tokens, which the agent had before."""
        new = prefixes[known // BLOCK :]
        self._prefixes.add(new, me)
        self._prefixes.add(_signed(new, me), me)
        longest = self.lengths[-1]
        begin = max(0, known - longest + 1)
        for text in (ids[begin:], output):
            for length, windows in zip(self.lengths, grams(text, self.lengths), strict=True):
                self._runs[length].add(windows, me)

    def _whole(self, messages: Sequence[Text], prefix: int, me: int, output: Text) -> int:
        """Tokens behind the prefix of messages that another agent had, whatever the role; then keeps these."""
        hashes = np.array([text.whole for text in (*messages, output)], dtype=np.uint64)
        lengths = np.array([len(m.content) for m in messages], dtype=np.int64)
        ends = np.cumsum(lengths + 1)
        behind = np.minimum(lengths, np.maximum(ends - prefix, 0))
        found = (_others(self._messages.holders(hashes[:-1]), me) != 0) & (behind >= self.min_run)
        self._messages.add(hashes, me)
        return int(behind[found].sum())

    def _named(self, other: Agents, covered: Flags) -> dict[str, int]:
        """Covered tokens by the agent of the last window that begins at or before them."""
        if not covered.any():
            return {}
        last = np.maximum.accumulate(np.where(other != 0, np.arange(len(other)), -1))
        at = np.concatenate([last, np.full(len(covered) - len(other), last[-1])])
        counts = np.bincount(other[at[covered]], minlength=len(self.agents) + 1)
        return {name: int(counts[number]) for name, number in self.agents.items() if counts[number]}


def _prefixes(ids: Hashes) -> Hashes:
    """Hashes of the beginnings of 16, 32, ... tokens."""
    return mixed(sums(ids)[BLOCK - 1 :: BLOCK])


def _signed(hashes: Hashes, agent: int) -> Hashes:
    return mixed(hashes ^ np.uint64(agent))


def _leading(flags: Flags) -> int:
    """How many are true before the first that is not."""
    return int(np.argmin(flags)) if not flags.all() else len(flags)


def _others(holders: tuple[Agents, Agents], me: int) -> Agents:
    """Who had it first, of all but this agent."""
    return np.where(holders[0] != me, holders[0], holders[1])


def _covered(begins: Flags, length: int, tokens: int) -> Flags:
    """Which of so many tokens are in a window of this length that begins at a true place."""
    steps = np.zeros(tokens + 1, dtype=np.int64)
    steps[: len(begins)] += begins
    steps[length : length + len(begins)] -= begins
    return np.cumsum(steps[:tokens]) > 0


def _stretches(begins: Flags, length: int) -> list[int]:
    """Lengths in tokens of what consecutive windows cover."""
    edges = np.diff(np.concatenate([[False], begins, [False]]).astype(np.int8))
    counts = np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0)
    return (counts + length - 1).tolist()  # type: ignore[no-any-return]  # of int64
