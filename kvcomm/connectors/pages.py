"""K/V in and out of an engine's paged cache, token by token, whatever the layout of a page.

Writing is the engine's own scatter. Reading inverts it: numbers written through the same scatter into one scratch block tell
where every element went. Knows nothing of requests or segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomm.connectors.vllm_compat import LayerCache
from kvcomm.errors import UnsupportedModel

__all__ = ["Pages"]

DIGIT = 128  # numbers are written digit by digit: all below this are exact in bf16


class Pages:
    """The paged cache of one worker: per layer [blocks, ...]. Tokens are addressed by a request's blocks and positions."""

    def __init__(self, layers: Sequence[LayerCache], block_size: int) -> None:
        self.layers, self.block_size = tuple(layers), block_size
        self._places: dict[tuple[object, ...], tuple[Tensor, tuple[int, ...] | None]] = {}  # layout -> _find_places

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].paged.dtype

    def slots(self, blocks: Sequence[int], positions: npt.NDArray[np.int64]) -> Tensor:
        """Where tokens at `positions` of a request lie: int64 [tokens]."""
        held = np.asarray(blocks, dtype=np.int64)
        return torch.from_numpy(held[positions // self.block_size] * self.block_size + positions % self.block_size)

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """keys, values [tokens, heads, dim] in the cache's dtype and on its device."""
        self.layers[layer].write(keys.contiguous(), values.contiguous(), slots)

    def read(self, layer: int, blocks: Sequence[int], start: int, end: int) -> tuple[Tensor, Tensor]:
        """Copies of keys and values of tokens [start, end) of a request, each [heads, tokens, dim], on the CPU. In memory their
        first axis is the token, as `write` wants it.
        """
        cache, size = self.layers[layer], self.block_size
        first = start // size
        held = torch.tensor(blocks[first : -(-end // size)], device=cache.paged.device)
        pages = cache.paged[held].flatten(1)  # [blocks, elements], a copy
        places, strides = self._layout(layer)
        shape = (2, size, cache.heads, cache.dim)
        if strides is None:
            sorted_ = pages[:, places].view(-1, *shape)
        else:
            sorted_ = pages.as_strided((len(pages), *shape), (pages.stride(0), *strides), 0)
        whole = sorted_.permute(1, 0, 2, 3, 4).reshape(2, -1, cache.heads, cache.dim)  # [2, tokens, heads, dim]
        skip = start - first * size
        out = whole[:, skip : skip + end - start].cpu()
        with torch.inference_mode(mode=False):  # ordinary tensors: torch counts writes to them
            keys, values = (x.clone(memory_format=torch.contiguous_format).transpose(0, 1) for x in out)
        return keys, values

    def _layout(self, layer: int) -> tuple[Tensor, tuple[int, ...] | None]:
        cache = self.layers[layer]
        kind = (
            type(cache.layer.impl),
            tuple(cache.paged.shape),
            cache.paged.stride(),
            cache.paged.dtype,
            cache.heads,
            cache.dim,
        )
        if kind not in self._places:
            self._places[kind] = self._find_places(cache)
        return self._places[kind]

    def _find_places(self, cache: LayerCache) -> tuple[Tensor, tuple[int, ...] | None]:
        """Where element [key or value, token, head, dim] of a block lies in its page, as int64 [elements]; and the strides of
        these four axes where they have any and the first element comes first.
        """
        shape = (2, self.block_size, cache.heads, cache.dim)
        count = int(np.prod(shape))
        numbers, found = torch.arange(count), torch.zeros(count, dtype=torch.int64)
        slots = torch.arange(self.block_size, device=cache.paged.device)
        scale = 1
        while scale < count:
            digits = (numbers // scale % DIGIT).to(cache.paged).view(shape)
            page = torch.zeros_like(cache.paged[:1])
            cache.write(digits[0].contiguous(), digits[1].contiguous(), slots, page)
            if page.numel() != count:
                raise UnsupportedModel(f"a block of its cache has {page.numel()} elements; {count} were expected")
            found += page.flatten().cpu().to(torch.int64) * scale
            scale *= DIGIT
        places = torch.empty(count, dtype=torch.int64)
        places[found] = numbers
        if not torch.equal(places.sort().values, numbers):
            raise UnsupportedModel("its cache does not hold what is written to it (quantised?)")
        table = places.view(shape)
        strides = tuple(int(table[*(int(i == j and n > 1) for j, n in enumerate(shape))]) for i in range(4))
        regular = sum(
            torch.arange(n).view(*(n if i == j else 1 for j in range(4))) * s
            for i, (n, s) in enumerate(zip(shape, strides, strict=True))
        )
        return places.to(cache.paged.device), strides if torch.equal(table, regular.expand(shape)) else None  # type: ignore[union-attr]  # a tensor: the sum has four terms
