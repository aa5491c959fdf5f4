"""Exact K/V of an early layer, as CacheBlend (arXiv 2405.16444) needs it: the first layers run over the whole prompt."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from kvcomm.backends.hf import HFBackend
from kvcomm.segments import Ids

__all__ = ["Early"]


class Early:
    """The first layers of a model, sharing its weights. `layer`: whose K/V is wanted, and how many run in full before it."""

    def __init__(self, backend: HFBackend, layer: int = 1) -> None:
        self.layer = layer
        decoder: Any = backend.model.get_decoder()
        self._decoder = copy.copy(decoder)
        self._decoder._modules = {**decoder._modules, "layers": decoder.layers[: layer + 1]}
        self._backend = backend

    @torch.no_grad()
    def kv(self, ids: Ids) -> tuple[Tensor, Tensor]:
        """K and V of the layer, each [heads, tokens, dim]."""
        cache = self._backend.cache(len(ids))
        self._decoder(input_ids=torch.from_numpy(ids).long()[None], past_key_values=cache, use_cache=True)
        layer = cache.layers[self.layer]
        keys, values = (x[0, :, : len(ids)].clone() for x in (layer.k, layer.v))
        self._backend.release(cache)
        return keys, values
