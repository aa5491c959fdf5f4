"""The pass over holes without an engine: how rows become forwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvcomm.connectors.holes import HolePass, Row


def forwards(rows: list[Row], max_tokens: int = 100, max_rows: int = 100) -> list[Any]:
    seen: list[Any] = []
    runner: Any = SimpleNamespace(max_tokens=max_tokens, max_rows=max_rows, forward=seen.append)
    holes = HolePass(runner, block_size=4)
    holes.run(rows)
    assert holes.passes == len(seen)
    assert holes.tokens == sum(len(row.ids) for row in rows)
    return seen


def row(start: int, tokens: int, blocks: tuple[int, ...] = (7, 3, 9, 5)) -> Row:
    return Row(blocks, start, np.arange(start, start + tokens, dtype=np.int32) + 100)


def test_one_forward_short_rows_first() -> None:
    (made,) = forwards([row(2, 3), row(9, 1)])
    assert (made.tokens, made.lengths) == ((1, 3), (10, 5))
    assert made.ids.tolist() == [109, 102, 103, 104]
    assert made.positions.tolist() == [9, 2, 3, 4]
    assert made.slots.tolist() == [9 * 4 + 1, 7 * 4 + 2, 7 * 4 + 3, 3 * 4]  # positions 9, 2, 3, 4 in blocks of 4
    assert [list(b) for b in made.blocks] == [[7, 3, 9], [7, 3]]


@pytest.mark.parametrize(("max_tokens", "max_rows"), [(3, 100), (100, 2), (5, 1), (1, 1)])
def test_limits_split_in_causal_order(max_tokens: int, max_rows: int) -> None:
    """Every token once, no forward beyond the limits, and none before those in front of it are done."""
    rows = [row(0, 4), row(6, 2), row(9, 7)]
    made = forwards(rows, max_tokens, max_rows)
    order = [sorted(m.positions.tolist()) for m in made]
    assert [p for batch in order for p in batch] == [*range(4), 6, 7, *range(9, 16)]
    assert all(len(m.ids) <= max_tokens and len(m.tokens) <= max_rows for m in made)


def test_nothing_to_do() -> None:
    assert forwards([]) == []
