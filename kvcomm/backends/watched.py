"""Attention of a pass that also says what the last token attends to.

Takes the place of the model's attention for one forward, as `grouped` does, and is told whom to report to by an argument that
the forward hands down to every layer, which transformers' interface for attention functions allows. Keeps nothing itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kvcomm.backends import grouped
from kvcomm.errors import CacheFault

__all__ = ["NAME", "Witness", "attend", "register"]

NAME = "kvcomm_watched"


@dataclass(eq=False)
class Witness:
    """What one forward's last token attends to, over the layers that have run. `own`: the model's eager attention."""

    own: Callable[..., tuple[Tensor, Tensor]] | None  # None: the model runs with fused attention, and so does the pass
    total: Tensor | None = None  # float32 [tokens], summed over layers
    layers: int = 0

    @classmethod
    def of(cls, model: nn.Module, implementation: str) -> Witness | None:
        """For a model that runs with `implementation`; None where its attention cannot be watched."""
        if not grouped.fits(model):
            return None
        if implementation.startswith(("sdpa", "flash", "flex")):
            return cls(None)
        own = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
        return cls(own) if implementation == "eager" and own is not None else None

    def add(self, weights: Tensor) -> None:
        """One layer's softmax weights [heads, tokens] of the last token."""
        mean = weights.float().mean(0)
        self.total = mean if self.total is None else self.total + mean.to(self.total.device)
        self.layers += 1

    def attention(self) -> Tensor:
        """float32 [tokens], mean over layers and heads."""
        assert self.total is not None, "no layer has called the watched attention"
        return self.total / self.layers


def attend(
    module: nn.Module,
    query: Tensor,  # [1, heads, r, dim]
    key: Tensor,  # [1, kv_heads, n, dim]
    value: Tensor,  # as key
    attention_mask: Tensor | None,  # [1, 1, r, n], additive
    witness: Witness | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As the model's own attention, and tells `witness` about the last row. Raises CacheFault where it was not handed down."""
    if witness is None or attention_mask is None:
        raise CacheFault("this model does not hand the arguments of its forward down to its attention")
    if witness.own is not None:
        out, weights = witness.own(module, query, key, value, attention_mask, **options)  # weights [1, heads, r, n]
        witness.add(weights[0, :, -1])
        return out, None
    witness.add(_weights(query[0, :, -1], key[0], attention_mask[0, 0, -1], options.get("scaling")))
    return grouped.attend(module, query, key, value, attention_mask, **options)


def _weights(query: Tensor, keys: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Softmax weights [heads, n] of one query [heads, dim] over keys [kv_heads, n, dim], mask [n]."""
    (heads, dim), kv_heads = query.shape, keys.shape[0]
    scores = query.view(kv_heads, heads // kv_heads, dim) @ keys.transpose(1, 2)  # [kv_heads, groups, n]
    return torch.softmax(scores.float() * (dim**-0.5 if scaling is None else scaling) + mask, dim=-1).flatten(0, 1)


def register() -> None:
    """Make the name known to transformers; any number of times."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
