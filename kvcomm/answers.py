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

__all__ = ["Alignment", "Block", "align"]


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
    never fed back to the model.
    """
    have = list(generated[:cached])
    if list(canonical) == have[: len(canonical)]:
        blocks: tuple[Block, ...] = (Block(0, 0, len(canonical)),)
    else:
        found = SequenceMatcher(None, have, list(canonical), autojunk=False).get_matching_blocks()
        blocks = tuple(Block(a, b, n) for a, b, n in found if n)
    covered = np.zeros(len(canonical), dtype=bool)
    for block in blocks:
        covered[block.canonical : block.canonical + block.tokens] = True
    return Alignment(blocks, np.flatnonzero(~covered))
