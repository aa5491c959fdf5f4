"""Moves cached keys to other positions, as the model itself would have rotated them there.

A key cached under the tables c0 = cos + i sin of its old position is taken to c1, those of its new one, by a single rotation by
c1 * conj(c0) / |c0|^2 in float32: nothing is lost at positions far out, where differences of angles are, and attention factors
(yarn, longrope) cancel. Tables come from a private copy of the model's rotary module, and are applied by the model's own
`apply_rotary_pos_emb`, so that half, interleaved and partial layouts and ropes per layer type need no code here. What cannot be
reached this way is found by `calibrate`. Knows nothing of caches, prompts or attention.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvcomm.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Rope", "Tables", "reach", "relative", "tolerance"]

STRETCHED = frozenset({"dynamic", "linear", "longrope", "yarn"})  # may reach beyond max_position_embeddings

Tables = Mapping[str | None, tuple[Tensor, Tensor]]
"""Layer type (None where all layers share one) -> cos, sin, each float32 [1, tokens, rotary_dim]."""


class Rope:
    """The rotary embedding of one model. Never changes the model; safe to use from several threads.

    `rotates[i]`: whether layer i's keys carry their position (NoPE layers do not). `follows_length`: whether tables depend on
    the length of the whole sequence (dynamic, longrope), which is why each call names one.
    """

    def __init__(self, decoder: nn.Module, layers: int, layer_types: Sequence[str] | None = None) -> None:
        """`decoder` holds `rotary_emb`. Raises UnsupportedModel where keys are not rotated by such a module."""
        rotary, apply = getattr(decoder, "rotary_emb", None), _apply_function(type(decoder))
        if rotary is None or apply is None:
            raise UnsupportedModel(
                "its keys are not rotated by a module of their own (learned positions, ALiBi, other rotations)"
            )
        self._rotary: nn.Module = copy.deepcopy(rotary)
        self._apply = apply
        per_type = "layer_type" in inspect.signature(inspect.unwrap(type(rotary).forward)).parameters
        self.types: tuple[str | None, ...] = tuple(layer_types) if per_type and layer_types else (None,) * layers
        self.rotates = (True,) * layers
        self._by_halves = False  # until `calibrate` finds that `_half_turn` does what the model's function does
        self._halves = 1  # 2 where a table holds each frequency once for two elements (gpt_oss)
        self._lock = threading.Lock()
        self.follows_length = True
        limit = getattr(getattr(rotary, "config", None), "max_position_embeddings", None) or 1 << 20
        self.follows_length = not self.same(1, 4 * limit)

    def reset(self, rotary: nn.Module, device: torch.device) -> None:
        """Bring a rotary module whose tables follow the length back to short ones; growth leaves a trace in it."""
        if self.follows_length:
            for layer_type in set(self.types):
                _call(rotary, torch.zeros(1, 1, dtype=torch.long, device=device), layer_type)

    def tables(self, positions: Tensor, length: int) -> Tables:
        """Tables of `positions` [tokens] (int64) in a sequence of `length` tokens."""
        where = torch.cat([positions, positions.new_tensor([length - 1])])[None]  # [1, tokens + 1]: the last sets the length
        with self._lock, torch.no_grad():
            self.reset(self._rotary, positions.device)
            return {t: tuple(x[:, :-1] for x in _call(self._rotary, where, t)) for t in set(self.types)}  # type: ignore[misc]

    def same(self, length: int, other: int) -> bool:
        """Whether sequences of these two lengths use the same tables."""
        if length == other or not self.follows_length:
            return True
        one = torch.ones(1, dtype=torch.long)
        a, b = self.tables(one, length), self.tables(one, other)
        return all(torch.equal(x, y) for t in a for x, y in zip(a[t], b[t], strict=True))

    def turn(self, new: Tables, old: Tables) -> Tables:
        """The rotation that takes keys under `old` tables to `new` ones, as tables: c1 * conj(c0) / |c0|^2."""
        out = {}
        for t, (c1, s1) in new.items():
            c0, s0 = old[t]
            scale = c0 * c0 + s0 * s0  # the square of the attention factor
            out[t] = (c1 * c0 + s1 * s0) / scale, (s1 * c0 - c1 * s0) / scale
        return out

    def rotate(self, layer: int, keys: Tensor, turn: Tables, out: Tensor) -> None:
        """Write `keys` [heads, tokens, dim] of one layer, rotated in float32, into `out` of the same shape and any dtype."""
        if not self.rotates[layer]:
            out.copy_(keys)
            return
        cos, sin = (x.to(keys.device) for x in turn[self.types[layer]])
        rotary_dim = cos.shape[-1] * self._halves
        x = keys[..., :rotary_dim].float()
        if self._by_halves:
            _half_turn(x, cos, sin, out)
        else:
            out[..., :rotary_dim] = self._apply(x[None, :0], x[None], cos, sin)[1][
                0
            ]  # no queries to rotate: zero heads of them
        out[..., rotary_dim:] = keys[..., rotary_dim:]

    def calibrate(self, near: Sequence[Tensor], far: Sequence[Tensor], turn: Tables) -> None:
        """Learn which layers rotate, from one token's keys per layer [heads, 1, dim] as the model cached them at two positions.

        `turn` takes the first position to the second. Raises UnsupportedModel if some layer's keys differ in another way, or if
        no layer rotates.
        """
        for self._halves in (1, 2):
            self.rotates = (True,) * len(near)
            try:
                errors = [self._error(i, a, b, turn) for i, (a, b) in enumerate(zip(near, far, strict=True))]
            except RuntimeError:  # shapes that do not fit: the other width, or none
                continue
            still = [relative(a, b) for a, b in zip(near, far, strict=True)]
            within = tolerance(near[0].dtype)
            self.rotates = tuple(s > within for s in still)
            if any(self.rotates) and all(s <= within or e <= within for s, e in zip(still, errors, strict=True)):
                self._by_halves = self._halves == 1 and all(self._same_by_halves(*table) for table in turn.values())
                return
        raise UnsupportedModel("its keys at another position are not the rotated keys of this one")

    def _same_by_halves(self, cos: Tensor, sin: Tensor) -> bool:
        """Whether the model's function turns random keys as `_half_turn` does."""
        x = torch.randn(2, *cos.shape[1:], generator=torch.Generator().manual_seed(0)).to(cos.device)
        lean = torch.empty_like(x)
        _half_turn(x, cos, sin, lean)
        return relative(lean, self._apply(x[None, :0], x[None], cos, sin)[1][0]) < 1e-6

    def _error(self, layer: int, near: Tensor, far: Tensor, turn: Tables) -> float:
        moved = torch.empty_like(near, dtype=torch.float32)
        self.rotate(layer, near, turn, moved)
        return relative(moved, far)


def _half_turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """The common layout, first half against second, written into `out` in a third of the time that the usual function takes.

    x float32 [heads, tokens, rotary_dim]; cos, sin [1, tokens, rotary_dim], their halves equal.
    """
    half = x.shape[-1] // 2
    a, b, c, s = x[..., :half], x[..., half:], cos[..., :half], sin[..., :half]
    turned = torch.empty_like(x)
    torch.mul(a, c, out=turned[..., :half]).addcmul_(b, s, value=-1)
    torch.mul(b, c, out=turned[..., half:]).addcmul_(a, s)
    out[..., : 2 * half] = turned


def reach(config: PreTrainedConfig) -> int | None:
    """Tokens that a text model's positions reach, as far as its configuration says so; None where it does not."""
    limit = getattr(config, "max_position_embeddings", None)
    ropes: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(r for r in ropes.values() if isinstance(r, Mapping))):  # one for all layers, or one per layer type
        if rope.get("rope_type") in STRETCHED:
            original = rope.get("original_max_position_embeddings")
            if original is None:
                return None
            limit = max(limit or 0, int((rope.get("factor") or 1) * original))
    return limit


def tolerance(dtype: torch.dtype) -> float:
    """How far a moved key may be from the model's own, relative to the largest element: some roundings of the model's dtype."""
    return max(1e-5, 4 * torch.finfo(dtype).eps)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference between two tensors, relative to the largest element of the second; NaN if either holds one."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30))


def _call(rotary: nn.Module, positions: Tensor, layer_type: str | None) -> tuple[Tensor, Tensor]:
    """cos and sin of positions [1, tokens], in float32 as the first argument is, whatever the model's dtype."""
    x = torch.empty(1, 0, dtype=torch.float32, device=positions.device)
    cos, sin = rotary(x, positions) if layer_type is None else rotary(x, positions, layer_type)
    return cos, sin


def _apply_function(decoder: type) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The model's own `apply_rotary_pos_emb`, from the module that defines the decoder or one of its bases."""
    for cls in decoder.__mro__:
        found: Any = getattr(sys.modules[cls.__module__], "apply_rotary_pos_emb", None)
        if found is not None:
            return found  # type: ignore[no-any-return]  # a function of a transformers module
    return None
