"""Pre-RoPE space against dense forwards of plain transformers, on every family."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcomm.segments import SegmentKV

if TYPE_CHECKING:
    from tests.backends.conftest import Case

START, END, MOVED = 20, 52, 9


def close(a: Tensor, b: Tensor, within: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= within * max(1.0, float(b.abs().max())))


def elsewhere(case: Case) -> SegmentKV:
    """Dense K/V of the case's tokens [START, END) behind MOVED other tokens."""
    ids = torch.cat(
        [case.prompt(7, MOVED), case.ids[:, START:END], case.prompt(8, case.ids.shape[1] - MOVED - (END - START))], dim=1
    )
    return case.dense(ids)[0]


def test_first_layer_depends_on_the_token_alone(case: Case) -> None:
    """Layer-0 keys of two dense runs that hold the same text at different places are the same in pre-RoPE space."""
    here = case.backend.plain(case.kv, START, END)
    there = case.backend.plain(elsewhere(case), MOVED, MOVED + END - START)
    assert here.tokens == END - START
    assert close(here.keys[0], there.keys[0])
    assert close(here.values[0], there.values[0])
    assert not close(here.values[-1], there.values[-1], 1e-2)


def test_base_plus_deviation_is_the_real_kv(case: Case) -> None:
    """A base from elsewhere, rotated into place by `fill` and corrected by its true deviation, is what a dense run caches."""
    base_kv = elsewhere(case)
    base = case.backend.plain(base_kv, MOVED, MOVED + END - START)
    deviation = case.backend.plain(case.kv, START, END).minus(base)
    cache = case.cache([(case.span(START, END, MOVED), base_kv)])
    case.backend.correct(cache, case.ids.shape[1], START, deviation)
    for layer, keys, values in zip(cache.layers, case.kv.keys, case.kv.values, strict=True):
        assert close(layer.k[0, :, START:END], keys[:, START:END])
        assert close(layer.v[0, :, START:END], values[:, START:END])
        assert bool(layer.k[0, :, END].isnan().all()), "tokens outside the run are left alone"


@pytest.mark.parametrize("tokens", [0, 3, 40])
def test_context_features(llama: Case, tokens: int) -> None:
    """As many features whatever stands in front; the nearest tokens decide."""
    ids = np.arange(5, 5 + tokens, dtype=np.int32)
    features = llama.backend.context(ids)
    assert features.shape == llama.backend.context(np.arange(90, dtype=np.int32)).shape
    assert features.dtype == torch.float32
    assert torch.equal(features, llama.backend.context(ids[-8:]))
    if tokens:
        other = ids.copy()
        other[-1] += 1
        assert not torch.equal(features, llama.backend.context(other))
