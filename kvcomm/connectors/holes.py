"""Computes tokens in the middle of prompts: all holes of a step as rows of one forward over the paged cache.

A row is one hole: a sequence that ends with it, on the block table of its request. Since every layer writes the K/V of all
rows before any of them attends, a row sees the fresh K/V of those in front of it: one forward gives what computing the holes
one after the other would. That forward is the engine's own, where it takes the holes in place of the last tokens of their
request, and a short one of its own before it where not. Knows nothing of vLLM beyond `Runner`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from kvcomm.connectors.messages import Load
from kvcomm.connectors.vllm_compat import Rows, Runner
from kvcomm.segments import Ids

__all__ = ["HolePass", "Row"]


@dataclass(frozen=True, eq=False)
class Row:
    """Tokens `ids` at [start, start + len(ids)) of a request whose paged cache is `blocks`."""

    blocks: Sequence[int]
    start: int
    ids: Ids

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    def part(self, start: int, end: int) -> Row:
        """Tokens [start, end) of it."""
        return Row(self.blocks, self.start + start, self.ids[start:end])


class HolePass:
    """The extra forward of one worker."""

    def __init__(self, runner: Runner, block_size: int) -> None:
        self._runner, self._block_size = runner, block_size
        self.passes = self.tokens = self.folded = 0  # so far: own forwards, tokens in them, requests folded into the engine's

    def run(self, rows: Sequence[Row]) -> None:
        """Computes the K/V of `rows`, those of one request in ascending order; whatever they attend to must be there, but for
        the rows themselves. In as few forwards as the engine's limits allow.
        """
        for batch in self._batches(rows):
            self._forward(batch)

    def fold(self, context: Any, loads: Sequence[Load]) -> set[str]:
        """Puts the holes of `loads` into the engine's forward that is about to run under `context`; whatever they attend to
        must be there. Returns the requests whose holes it takes.
        """
        wanted = {}
        for load in loads:
            at = np.concatenate([np.arange(a, b) for a, b in load.holes])
            wanted[load.request_id] = torch.from_numpy(load.ids[at]), torch.from_numpy(at)
        taken = self._runner.fold(context, wanted)
        self.folded += len(taken)
        return taken

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Rows in order, split where a forward has as many tokens or rows as the engine allows."""
        batch: list[Row] = []
        room = self._runner.max_tokens
        for row in rows:
            done = 0
            while done < len(row.ids):
                if not room or len(batch) == self._runner.max_rows:
                    yield batch
                    batch, room = [], self._runner.max_tokens
                take = min(len(row.ids) - done, room)
                batch.append(row.part(done, done + take))
                done, room = done + take, room - take
        if batch:
            yield batch

    def _forward(self, batch: list[Row]) -> None:
        batch = sorted(batch, key=lambda row: len(row.ids))  # some backends want short queries first; the order is free
        blocks = [row.blocks[: -(-row.end // self._block_size)] for row in batch]
        positions = [torch.arange(row.start, row.end) for row in batch]
        slots = [
            torch.tensor(held)[at // self._block_size] * self._block_size + at % self._block_size
            for held, at in zip(blocks, positions, strict=True)
        ]
        self._runner.forward(
            Rows(
                ids=torch.cat([torch.from_numpy(row.ids.astype("int32")) for row in batch]),
                positions=torch.cat(positions),
                slots=torch.cat(slots),
                tokens=tuple(len(row.ids) for row in batch),
                lengths=tuple(row.end for row in batch),
                blocks=blocks,
            )
        )
        self.passes += 1
        self.tokens += list(accumulate(len(row.ids) for row in batch))[-1]
