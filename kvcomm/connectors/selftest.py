"""Tries an engine at start-up, on two scratch blocks of its empty cache: can its keys be moved, and can holes be computed?
And when its own forward first took somebody's holes: did it compute them?

The rope is Hugging Face's own for this configuration; that vLLM's keys follow it is measured, not assumed. Knows nothing of
requests, stores or versions of vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcomm.connectors.holes import HolePass, Row
from kvcomm.connectors.messages import Load
from kvcomm.connectors.pages import Pages
from kvcomm.connectors.vllm_compat import Rows, Runner
from kvcomm.errors import UnsupportedModel
from kvcomm.rope import Rope, relative, tolerance

__all__ = ["try_engine", "try_fold", "try_holes"]

HERE, THERE = (1,), (2,)  # blocks; number 0 is never a request's
FAR = 97  # the second position; odd, so that no frequency of a small table is back at its start
IDS = np.arange(5, 11, dtype=np.int32)


@torch.inference_mode()
def try_engine(hf_config: Any, pages: Pages, runner: Runner, max_length: int) -> Rope:
    """The engine's rope, calibrated on keys of its own: one token at two positions. Raises UnsupportedModel."""
    rope = _rope(hf_config, len(pages.layers))
    far = min(FAR, max_length - 1)
    slots = torch.tensor([block * pages.block_size for (block,) in (HERE, THERE)])
    where = torch.tensor([0, far])
    runner.forward(Rows(torch.tensor([5, 5], dtype=torch.int32), where, slots, (1, 1), (1, 1), (HERE, THERE)))
    near, moved = (_read(pages, blocks, 0, 1) for blocks in (HERE, THERE))
    if not all(relative(b, a) <= tolerance(a.dtype) for (_, a), (_, b) in zip(near, moved, strict=True)):
        raise UnsupportedModel("its values depend on the position, and only keys can be moved")
    old, new = (rope.tables(torch.tensor([p]), max_length) for p in (0, far))
    rope.calibrate([k for k, _ in near], [k for k, _ in moved], rope.turn(new, old))
    return rope


@torch.inference_mode()
def try_holes(pages: Pages, holes: HolePass) -> None:
    """Six tokens computed at once, against the third and the last of them computed as holes between the others' K/V, where
    garbage was. Raises UnsupportedModel where they differ.
    """
    holes.run([Row(HERE, 0, IDS)])
    right = _read(pages, HERE, 0, len(IDS))
    slots = pages.slots(THERE, np.arange(len(IDS)))
    for layer, (keys, values) in enumerate(right):
        k, v = (x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in (keys, values))  # [tokens, heads, dim]
        for x in (k, v):
            x[[2, 5]] = 100.0
        device = pages.layers[layer].paged.device
        pages.write(layer, k.to(device), v.to(device), slots.to(device))
    holes.run([Row(THERE, 2, IDS[2:3]), Row(THERE, 5, IDS[5:])])
    _compare(_read(pages, THERE, 0, len(IDS)), right, "computing a hole of its cache differs from its prefill")


@torch.inference_mode()
def try_fold(pages: Pages, holes: HolePass, load: Load) -> None:
    """The K/V that the engine's forward has left for the holes of `load`, against computing them apart. Raises UnsupportedModel
    where they differ; the K/V is right afterwards, what the engine made of it is not.
    """
    found = [_read(pages, load.blocks, a, b) for a, b in load.holes]
    holes.run([Row(load.blocks, a, load.ids[a:b]) for a, b in load.holes])
    for (a, b), kv in zip(load.holes, found, strict=True):
        _compare(kv, _read(pages, load.blocks, a, b), "its forward leaves other K/V for tokens that were put into it")


def _compare(found: Sequence[tuple[Tensor, Tensor]], right: Sequence[tuple[Tensor, Tensor]], what: str) -> None:
    for (k, v), (rk, rv) in zip(found, right, strict=True):
        worst = max(relative(k, rk), relative(v, rv))
        if not worst <= min(0.2, 1000 * tolerance(k.dtype)):  # noise is far below, garbage that was seen far above
            raise UnsupportedModel(f"{what} by {worst:.2g}")


def _read(pages: Pages, blocks: Sequence[int], start: int, end: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values per layer, [heads, tokens, dim]."""
    return [pages.read(layer, blocks, start, end) for layer in range(len(pages.layers))]


def _rope(hf_config: Any, layers: int) -> Rope:
    """From the configuration alone: the weights are the engine's."""
    from transformers import AutoModel

    if hf_config.num_hidden_layers != layers:
        raise UnsupportedModel(f"{hf_config.num_hidden_layers} layers cache K/V {layers} times")
    try:
        with torch.device("meta"):
            skeleton: Any = AutoModel.from_config(hf_config)
        decoder = skeleton.get_decoder()
        decoder.rotary_emb = type(decoder.rotary_emb)(hf_config)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"transformers knows no rotary embedding for it: {error!r}") from error
    rope = Rope(decoder, layers, getattr(hf_config, "layer_types", None))
    if rope.follows_length:
        raise UnsupportedModel("its rotary tables follow the length of the sequence")
    return rope
