"""The embedded model before training: a plain Llama whose first layer already looks a few tokens back."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["config", "structured_start"]


def config(vocab_size: int) -> LlamaConfig:
    attention: dict[str, Any] = {"attn_implementation": "sdpa"}  # an option of every configuration, named in no signature
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=320, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, bos_token_id=1, eos_token_id=6, pad_token_id=0,
        use_cache=False, **attention,
    )  # fmt: skip


@torch.no_grad()
def structured_start(model: LlamaForCausalLM, constant: float = 0.1, gain: float = 1.3, frequencies: int = 8) -> None:
    """Scales the random start and turns head h of layer 0 into an "attend h + 1 tokens back" head."""
    c: Any = model.config  # all of what is read here is set in `config`
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.normal_(std=0.02 if "embed" in name else p.shape[1] ** -0.5)
            if "o_proj" in name or "down_proj" in name:
                p.mul_((2 * c.num_hidden_layers) ** -0.5)
    model.model.embed_tokens.weight[:, 0] = constant
    attention, d = model.model.layers[0].self_attn, c.head_dim
    attention.q_proj.weight *= 0.3
    attention.k_proj.weight *= 0.3
    attention.o_proj.weight *= (2 * c.num_hidden_layers) ** 0.5
    angle = c.rope_parameters["rope_theta"] ** (-torch.arange(0, d, 2).float() / d)[:frequencies]
    for head in range(c.num_key_value_heads):
        rows = attention.k_proj.weight[head * d : (head + 1) * d, 0]
        rows.zero_()[:frequencies] = gain
    for head in range(c.num_attention_heads):
        rows = attention.q_proj.weight[head * d : (head + 1) * d, 0]
        rows.zero_()[:frequencies] = gain * torch.cos(angle * (head + 1))
        rows[d // 2 : d // 2 + frequencies] = -gain * torch.sin(angle * (head + 1))
