"""Attention with folded query heads against transformers' own sdpa attention, which copies the keys for every head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention

from kvcomm.backends import grouped


def module(heads: int, kv_heads: int) -> nn.Module:
    config = LlamaConfig(hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    return LlamaAttention(config, layer_idx=0).eval()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (4, 4)])
@pytest.mark.parametrize("masks", [0, 1, 2])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_equals_transformers(heads: int, kv_heads: int, masks: int, scaling: float | None) -> None:
    """No mask, one for all heads, one per head; grouped or not."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, heads, 5, 8), torch.randn(2, kv_heads, 30, 8), torch.randn(2, kv_heads, 30, 8)
    seen = torch.arange(30) <= torch.tensor([3, 9, 10, 20, 29])[:, None]
    mask = torch.zeros(5, 30).masked_fill(~seen, torch.finfo(torch.float32).min)
    given = None if not masks else mask[None, None].expand(2, 1 if masks == 1 else heads, 5, 30)
    own = sdpa_attention_forward(module(heads, kv_heads), q, k, v, given, scaling=scaling)[0]
    folded = grouped.attend(module(heads, kv_heads), q, k, v, given, scaling=scaling)[0]
    assert folded.shape == own.shape == (2, 5, heads, 8)
    assert torch.allclose(folded, own, atol=1e-6)
    if given is not None:
        changed = grouped.attend(module(heads, kv_heads), q, k, v, given * 0, scaling=scaling)[0]
        assert not torch.allclose(changed, own, atol=1e-3), "the mask matters"


def test_models_with_a_table_of_their_own_are_left_alone() -> None:
    """A model class whose module has no common table of attention functions."""

    class Own(nn.Module):
        pass

    assert not grouped.fits(Own())
