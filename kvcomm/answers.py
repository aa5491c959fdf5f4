"""An answer under the ids its readers will see.

Generated ids need not be the ids of the same text encoded again ("\\n", "\\n" against "\\n\\n"), and readers paste text. So a
finished answer is re-encoded once; KV follows where both id sequences agree, the rest is computed again. Pure ids, no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
import numpy.typing as npt

__all__ = ["COMPARED", "Alignment", "Block", "align"]

COMPARED = 512  # tokens; comparing takes the square of them, 0.1 s at worst


@dataclass(frozen=True)
class Block:
    """`tokens` ids that stand at `generated` in the answer as it was sampled and at `canonical` in its re-encoding."""

    generated: int
    canonical: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Alignment:
    blocks: tuple[Block, ...]
    missing: npt.NDArray[np.int64]  # canonical positions without KV, ascending

    @property
    def in_place(self) -> bool:
        """The KV can be taken as it is: nothing moved and nothing is missing."""
        return len(self.missing) == 0 and all(b.generated == b.canonical for b in self.blocks)


def align(generated: Sequence[int], canonical: Sequence[int], cached: int) -> Alignment:
    """Where the re-encoded answer finds its KV. Only the first `cached` generated tokens have any: the last one sampled was
    never fed back to the model. Between equal ends, more than COMPARED tokens count as missing.

        generated  |  front  |   between   |     back     | end     back reaches to the last token, or to the last cached one
        canonical  |  front  | between  |     back     |
    """
    ours, theirs = list(generated), list(canonical)
    front = _common(ours[:cached], theirs)
    ends = {end: _common(ours[front:end][::-1], theirs[front:][::-1]) for end in (cached, len(ours))}
    end = max(ends, key=lambda e: ends[e])
    back, at = end - ends[end], len(theirs) - ends[end]
    blocks = [Block(0, 0, front)]
    a, b = ours[front : min(back, cached)], theirs[front:at]
    if max(len(a), len(b)) <= COMPARED:
        found = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
        blocks += [Block(front + i, front + j, n) for i, j, n in found]
    blocks.append(Block(back, at, min(end, cached) - back))
    covered = np.zeros(len(theirs), dtype=bool)
    for block in blocks:
        covered[block.canonical : block.canonical + max(block.tokens, 0)] = True
    return Alignment(tuple(block for block in blocks if block.tokens > 0), np.flatnonzero(~covered))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
