"""Decides at load whether a Hugging Face model's KV can be moved and recomputed in part, and says why not.

First what its configuration says, then what it does: the same token at two positions must have the same values, and keys that
one rotation takes into each other; and a pass over two of six tokens must equal the dense forward while its future is garbage.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvcomm.backends.one_pass import OnePass
from kvcomm.backends.span_cache import LayerShape, SpanCache
from kvcomm.errors import UnsupportedModel
from kvcomm.rope import Rope, relative, tolerance

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["probe"]

FAR = 97  # the second position; odd, so that no frequency of a small table is back at its start


@torch.no_grad()
def probe(model: PreTrainedModel) -> tuple[Rope, tuple[LayerShape, ...]]:
    """The model's rope and what its layers cache. Costs three forwards of at most six tokens and leaves the model as it was.
    Raises UnsupportedModel with one sentence.
    """
    try:
        reason = _unsuitable(model)
        if reason is not None:
            raise UnsupportedModel(reason)
        config, decoder = model.config.get_text_config(decoder=True), model.get_decoder()
        windows = _windows(config)
        rope = Rope(decoder, len(windows), getattr(config, "layer_types", None))
        missing = {"position_ids", "past_key_values", "logits_to_keep"} - set(inspect.signature(model.forward).parameters)
        if missing:
            raise UnsupportedModel(f"its forward does not take {', '.join(sorted(missing))}")
        with _borrowed(model, decoder):
            shapes = _try_positions(model, rope, windows)
            _try_pass(model, config, shapes)
    except UnsupportedModel as refusal:
        raise UnsupportedModel(f"{type(model).__name__} cannot share its KV: {refusal}") from None
    except Exception as error:  # whatever a foreign forward raises means the same here
        raise UnsupportedModel(f"{type(model).__name__} cannot share its KV: trying its cache failed with {error!r}") from error
    return rope, shapes


def _unsuitable(model: PreTrainedModel) -> str | None:
    """What rules a model out before anything is run."""
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(model, "get_decoder"):
        return "it is not a transformers model; give the PreTrainedModel itself, not a wrapper of it"
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, whose decoder attends to an encoder that has no KV-cache of the prompt"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state (state-space or hybrid), which cannot be taken from the middle of another prompt"
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        return "it caches a compressed latent (MLA), whose position is not in the keys"
    return None


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """Sliding window per layer, from the cache that transformers itself would build."""
    layers = DynamicCache(config=config).layers
    kinds = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    types = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or types or getattr(config, "attention_chunk_size", None):
        names = ", ".join(sorted({*types, *(kind.__name__ for kind in kinds)})) or "chunked attention"
        raise UnsupportedModel(f"not all its layers are full or sliding-window attention ({names})")
    if len(layers) != config.num_hidden_layers:
        raise UnsupportedModel(f"{config.num_hidden_layers} layers share the K/V of {len(layers)}")
    return [getattr(layer, "sliding_window", None) for layer in layers]


@contextmanager
def _borrowed(model: PreTrainedModel, decoder: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and rotates with a copy of its rotary module, whose tables may be left changed."""
    training = [module for module in model.modules() if module.training]
    rotary = decoder.rotary_emb
    try:
        for module in training:
            module.training = False
        decoder.rotary_emb = copy.deepcopy(rotary)
        yield
    finally:
        decoder.rotary_emb = rotary
        for module in training:
            module.training = True


def _try_positions(model: PreTrainedModel, rope: Rope, windows: Sequence[int | None]) -> tuple[LayerShape, ...]:
    """One token at positions 0 and FAR."""
    cache = DynamicCache()
    where = torch.tensor([[0], [FAR]], device=model.device)
    model(input_ids=torch.full_like(where, 5), position_ids=where, past_key_values=cache, use_cache=True)
    if len(cache.layers) != len(windows):
        raise UnsupportedModel(f"{len(windows)} layers cache K/V {len(cache.layers)} times")
    keys, values = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))  # each [2, heads, 1, dim]
    if not all(relative(v[1], v[0]) <= tolerance(v.dtype) for v in values):
        raise UnsupportedModel("its values depend on the position (learned positions?), and only keys can be moved")
    near, far = (rope.tables(p, FAR + 1) for p in where)
    rope.calibrate([k[0] for k in keys], [k[1] for k in keys], rope.turn(far, near))
    return tuple(
        LayerShape(k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device, window)
        for k, v, window in zip(keys, values, windows, strict=True)
    )


def _try_pass(model: PreTrainedModel, config: PreTrainedConfig, shapes: Sequence[LayerShape]) -> None:
    """Six tokens, the third and the last recomputed, garbage in all that the third must not see."""
    ids = torch.arange(5, 11, device=model.device)[None]
    dense, cache = (SpanCache(shapes, [shape.buffers(8) for shape in shapes]) for _ in range(2))
    model(input_ids=ids, past_key_values=dense, use_cache=True)
    for layer, known in zip(cache.layers, dense.layers, strict=True):
        for buffer, right in ((layer.k, known.k), (layer.v, known.v)):
            buffer.fill_(100.0)
            buffer[:, :, :2] = right[:, :, :2]
    one = OnePass(config, cache, ids, torch.tensor([2, 5], device=model.device), shapes[0].dtype)
    try:
        model(**one.begin({"input_ids": ids[:, 5:]}), past_key_values=cache, use_cache=True)
    finally:
        one.restore()
    for layer, known in zip(cache.layers, dense.layers, strict=True):
        worst = max(relative(a[:, :, 2], b[:, :, 2]) for a, b in ((layer.k, known.k), (layer.v, known.v)))
        if not worst <= min(0.2, 1000 * tolerance(layer.k.dtype)):  # noise is far below, garbage that was seen far above
            raise UnsupportedModel(f"recomputing one of its tokens differs from its dense forward by {worst:.2g}")
