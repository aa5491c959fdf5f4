"""Which tokens are doubted so much that they are computed again."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["far_above"]


def far_above(doubt: Tensor, times: float) -> Tensor:
    """bool [n]: what is more than `times` the lower decile of all doubts [n] but those of 0, which stand for no doubt at all.

    Few tokens depend on what stands in front of them in a way that anchors do not foresee, more of them in dense text. So the
    measure is what the text's own least doubtful tokens have, not a share of the text.
    """
    some = doubt[doubt > 0]
    if not len(some):
        return torch.zeros_like(doubt, dtype=torch.bool)
    lower = some.sort().values[len(some) // 10]
    return (doubt > 0) & (doubt > times * lower)
