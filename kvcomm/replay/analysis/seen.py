"""Which agents had a text: a table from 64-bit hashes to the first two agents that had what was hashed.

Two are enough to tell whether somebody else had it. Open addressing in numpy arrays: a hash takes some 50 bytes, and a whole
prompt is looked up at once. Hashes are believed: an accident needs about 2**32 of them in one table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvcomm.replay.analysis.tokens import Hashes, mixed

__all__ = ["Agents", "Seen", "grams"]

Agents = npt.NDArray[np.uint32]  # numbers of agents from 1; 0 is nobody
SMALLEST = 1 << 10  # slots


class Seen:
    """Mutable. Hashes must be well mixed."""

    def __init__(self) -> None:
        self._keys = np.zeros(SMALLEST, dtype=np.uint64)  # 0: free
        self._agents = np.zeros((2, SMALLEST), dtype=np.uint32)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._agents.nbytes

    def holders(self, hashes: Hashes) -> tuple[Agents, Agents]:
        """The first and the second agent of each."""
        slots = self._slots(_keyed(hashes))
        return self._agents[0, slots], self._agents[1, slots]

    def add(self, hashes: Hashes, agent: int) -> None:
        hashes = _keyed(hashes)
        slots = self._slots(hashes)
        missing = self._keys[slots] == 0
        if missing.any():
            new, which = np.unique(hashes[missing], return_inverse=True)
            if 2 * (self._used + len(new)) > len(self._keys):
                self._grow(self._used + len(new))
                slots = self._slots(hashes)
            slots[missing] = self._place(new)[which]
        first, second = self._agents[0, slots], self._agents[1, slots]
        self._agents[0, slots[first == 0]] = agent
        self._agents[1, slots[(first != 0) & (first != agent) & (second == 0)]] = agent

    def _slots(self, keys: Hashes) -> npt.NDArray[np.int64]:
        """Where each is, or the free slot where it would be."""
        mask = len(self._keys) - 1
        slots = (keys & np.uint64(mask)).astype(np.int64)
        todo = np.arange(len(keys))
        while len(todo):
            there = self._keys[slots[todo]]
            todo = todo[(there != 0) & (there != keys[todo])]
            slots[todo] = (slots[todo] + 1) & mask
        return slots

    def _place(self, keys: Hashes) -> npt.NDArray[np.int64]:
        """Gives each of these new keys a slot of its own; of several that want the same one, one gets it at a time."""
        self._used += len(keys)
        out = np.empty(len(keys), dtype=np.int64)
        todo = np.arange(len(keys))
        while len(todo):
            slots = self._slots(keys[todo])
            self._keys[slots] = keys[todo]
            got = self._keys[slots] == keys[todo]
            out[todo[got]] = slots[got]
            todo = todo[~got]
        return out

    def _grow(self, wanted: int) -> None:
        keys, agents = self._keys, self._agents
        size = 1 << (3 * wanted).bit_length()
        self._keys, self._agents = np.zeros(size, dtype=np.uint64), np.zeros((2, size), dtype=np.uint32)
        self._used = 0
        old = np.flatnonzero(keys)
        self._agents[:, self._place(keys[old])] = agents[:, old]


def grams(hashes: Hashes, lengths: tuple[int, ...]) -> list[Hashes]:
    """For each length the hashes of all runs of so many tokens; empty where there are fewer tokens. By doubling."""
    out = []
    power, have = 1, hashes
    for length in sorted(lengths):
        while 2 * power <= length and len(have):
            have = _joined(have, power)
            power *= 2
        out.append(_joined(have, length - power) if length > power else have)
    return out


def _joined(runs: Hashes, shift: int) -> Hashes:
    """Hashes of every run together with the one that begins `shift` tokens later."""
    if len(runs) <= shift:
        return runs[:0]
    return mixed(runs[: len(runs) - shift] * np.uint64(0xD6E8FEB86659FD93) + runs[shift:])


def _keyed(hashes: Hashes) -> Hashes:
    return np.where(hashes == 0, np.uint64(1), hashes)
