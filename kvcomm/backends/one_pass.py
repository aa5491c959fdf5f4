"""One forward over the tokens to recompute, every other token's K/V being in the cache already.

    prompt    | known  | R R |   known   | R R R R |       R: `recompute`, ascending, the last token always among them
    forward     writes K/V of all R by position, then attends under a mask by position: row i sees tokens 0 .. R[i]

That is what recomputing them one after the other gives, for the price of one short step. `begin` turns the forward that
generate makes for its last prompt token into the pass, `end` makes the outcome look like that forward's own. Knows no spans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcomm.backends import watched

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from kvcomm.backends.span_cache import SpanCache

__all__ = ["OnePass", "masks"]


@dataclass
class OnePass:
    """The pass over one prompt; changes `cache`, and nothing else that outlives the forward."""

    config: PreTrainedConfig  # of the text model
    cache: SpanCache
    ids: Tensor  # [1, tokens]
    recompute: Tensor  # [r] int64, on the device of ids
    dtype: torch.dtype  # of the mask
    masked: str = "sdpa"  # attention that can mask by position, in place of sdpa and of those that cannot
    witness: watched.Witness | None = None  # who is told what the last token attends to
    keep: int | None = None  # tokens at the end whose logits are wanted; None: those that generate asks for
    rows: int = 1
    begun: bool = False
    swapped: str | None = None  # the attention to put back

    @property
    def start(self) -> int:
        """The first recomputed token if all behind it are recomputed too, else -1: then the forward appends like any other.
        -1 also where `masked` spares the copy of all keys per query head that several appended tokens cost under sdpa, and
        where somebody watches.
        """
        if self.witness is not None:
            return -1
        first, tokens = int(self.recompute[0]), self.ids.shape[1]
        grouped = self.config._attn_implementation == "sdpa" != self.masked and len(self.recompute) > 1
        return first if len(self.recompute) == tokens - first and not grouped else -1

    def begin(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the forward that is now the pass. Drafted tokens behind the prompt (assisted decoding) come along."""
        tokens = self.ids.shape[1]
        given: Tensor = kwargs["input_ids"]  # [rows, 1], or the whole prompt and the draft
        new = given[:, tokens - 1 :] if given.shape[1] >= tokens else given
        self.begun, self.rows = True, given.shape[0]
        total = tokens - 1 + new.shape[1]
        at = torch.cat([self.recompute[:-1], torch.arange(tokens - 1, total, device=self.ids.device)])
        out = {
            **kwargs,
            "input_ids": torch.cat([self.ids[:, self.recompute[:-1]], new[:1]], dim=1),
            "position_ids": at[None],
            "attention_mask": None,
            "logits_to_keep": self.keep or new.shape[1],
        }
        if "cache_position" in kwargs:  # wanted by model code of older days
            out["cache_position"] = at
        if self.start >= 0:
            self.cache.set_length(self.start)
            return out
        self.cache.set_length(total, at)
        attention = self.config._attn_implementation
        if self.witness is not None:
            out["witness"] = self.witness
            self.swapped, self.config._attn_implementation = attention, watched.NAME
        elif attention.startswith(("sdpa", "flash", "flex")):  # the last two cannot mask by position
            self.swapped, self.config._attn_implementation = attention, self.masked
        return {**out, "attention_mask": masks(self.config, at, total, self.dtype)}

    def end(self, logits: Tensor) -> Tensor:
        """Logits as generate expects them, [rows, new tokens, vocabulary]; every row gets the cache of the one computed."""
        self.restore()
        for layer in self.cache.layers:
            layer.at = None
        if self.rows > 1:
            self.cache.batch_repeat_interleave(self.rows)
            logits = logits.expand(self.rows, -1, -1)
        return logits

    def restore(self) -> None:
        """Put the model's attention back, whether the forward came through or not."""
        if self.swapped is not None:
            self.config._attn_implementation, self.swapped = self.swapped, None


def masks(config: PreTrainedConfig, at: Tensor, tokens: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Additive masks [1, 1, len(at), tokens] for queries at positions `at`: one per layer type where the configuration has
    layer types, else one for all layers, windowed if they are. That is the rule of transformers' `create_masks_for_generate`.
    """

    def mask(window: int | None) -> Tensor:
        j = torch.arange(tokens, device=at.device)
        seen = j <= at[:, None]
        if window is not None:
            seen &= j > at[:, None] - window
        return torch.zeros(seen.shape, dtype=dtype, device=at.device).masked_fill_(~seen, torch.finfo(dtype).min)[None, None]

    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if types is None:
        return mask(window)
    return {t: mask(window if t == "sliding_attention" else None) for t in set(types)}
