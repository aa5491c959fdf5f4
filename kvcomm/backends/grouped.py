"""Attention of the one pass under grouped queries: the query heads of a group become rows of one head, so no key is copied.

    query [1, heads, r, dim]  ->  [1, kv_heads, groups * r, dim]        mask [1, 1, r, n]  ->  [1, 1, groups * r, n]

Transformers repeats keys and values for every query head as soon as there is a mask: most of what attention costs in a short
pass. Registered under a name of its own, by transformers' own interface for that; no model uses it outside of the pass.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["NAME", "attend", "fits", "register"]

NAME = "kvcomm_grouped"


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`, to which everything unusual goes: [rows, r, heads, dim]."""
    (rows, heads, r, dim), kv_heads = query.shape, key.shape[1]
    if heads == kv_heads or attention_mask is None or attention_mask.shape[1] > 1 or options.get("position_bias") is not None:
        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out
    groups = heads // kv_heads
    folded = query.reshape(rows, kv_heads, groups * r, dim)
    seen = attention_mask.repeat(1, 1, groups, 1)
    done = F.scaled_dot_product_attention(folded, key, value, attn_mask=seen, scale=options.get("scaling"))
    return done.view(rows, heads, r, -1).transpose(1, 2).contiguous(), None


def fits(model: nn.Module) -> bool:
    """Whether the model takes its attention from transformers' common table, not from one of its own."""
    module = sys.modules[type(model).__module__]
    return getattr(module, "ALL_ATTENTION_FUNCTIONS", None) is ALL_ATTENTION_FUNCTIONS


def register() -> None:
    """Make the name known to transformers; any number of times."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
