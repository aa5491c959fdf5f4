"""The draft check against a reference in plain transformers: a plain cache, eager attention, one token per forward."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvcomm.backends.hf import HFBackend
from kvcomm.backends.span_cache import SpanCache
from kvcomm.draft_check import check
from kvcomm.segments import Segment, SegmentKV, Span
from kvcomm.testing import tiny_random

FAMILIES = ("llama", "qwen3", "phi3", "gemma3", "gpt_neox", "smollm3", "gpt_oss")
N = 60
IDS = torch.randint(3, 200, (1, N), generator=torch.Generator().manual_seed(3))
RECOMPUTE = torch.tensor([9, 10, 30, *range(50, N)])
APPROXIMATE = torch.tensor([i for i in range(5, 50) if i not in (9, 10, 30)])
Rows = tuple[list[Tensor], list[Tensor]]  # keys and values per layer [heads, tokens, dim]


def dense(model: PreTrainedModel) -> Rows:
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
    layers: Any = cache.layers
    return [x.keys[0].clone() for x in layers], [x.values[0].clone() for x in layers]


def disturbed(rows: Rows, size: float) -> Rows:
    """Noise on what is reused."""
    out = [x.clone() for x in rows[0]], [x.clone() for x in rows[1]]
    for i, x in enumerate([*out[0], *out[1]]):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        x[:, APPROXIMATE] += size * x.std() * noise[:, APPROXIMATE]
    return out


def filled(backend: HFBackend, rows: Rows) -> SpanCache:
    cache = backend.cache(N)
    kv = SegmentKV(tuple(rows[0]), tuple(rows[1]), 0, N)
    nothing = np.zeros(0, np.int32)
    backend.fill(cache, N, [(Span(0, 50, "rotate", Segment(nothing, nothing, ""), 0), kv)])
    return cache


@torch.no_grad()
def one_by_one(model: PreTrainedModel, rows: Rows, ids: Tensor, at: list[int]) -> tuple[Tensor, Tensor]:
    """Computes tokens `at` again, in place. Log-probabilities [at, vocabulary]; attention of each [at, tokens], padded."""
    out, attention = [], torch.zeros(len(at), ids.shape[1])
    for n, i in enumerate(at):
        past = DynamicCache()
        for layer, (k, v) in enumerate(zip(*rows, strict=True)):
            past.update(k[None, :, :i].clone(), v[None, :, :i].clone(), layer)
        done = model(input_ids=ids[:, i : i + 1], past_key_values=past, use_cache=True, output_attentions=True)
        layers: Any = past.layers
        for layer, x in enumerate(layers):
            for kept, new in ((rows[0], x.keys[0]), (rows[1], x.values[0])):
                kept[layer] = torch.cat([new, kept[layer][:, i + 1 :]], dim=1)
        out.append(done.logits[0, -1].log_softmax(-1))
        attention[n, : i + 1] = torch.stack([a[0, :, -1] for a in done.attentions]).mean((0, 1))
    return torch.stack(out), attention


def reference(model: PreTrainedModel, rows: Rows, tokens: int, draft: int) -> tuple[float, list[int], list[int]]:
    """KL, positions computed again, and the draft."""
    model.set_attn_implementation("eager")
    before, attention = one_by_one(model, rows, IDS, RECOMPUTE.tolist())
    kept, mass, ids = [before[-1]], attention[-1], IDS
    drafted = [int(before[-1].argmax())]
    while len(drafted) < draft:
        ids = torch.cat([ids, torch.tensor([drafted[-1:]])], dim=1)
        more, attention = one_by_one(model, rows, ids, [ids.shape[1] - 1])
        kept.append(more[0])
        mass = mass + attention[0, :N]
        drafted.append(int(more[0].argmax()))
    again = sorted(sorted(APPROXIMATE.tolist(), key=lambda i: -float(mass[i]))[:tokens])
    after, _ = one_by_one(model, rows, ids, [*again, *range(N - 1, ids.shape[1])])
    after = after[len(again) :]
    kl = max(float((p.exp() * (p - q)).sum()) for p, q in zip(after, kept, strict=True))
    return kl, again, drafted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tokens", "draft"), [(8, 1), (4, 5)])
def test_equals_the_reference(family: str, tokens: int, draft: int) -> None:
    backend = HFBackend(tiny_random(family))
    rows = disturbed(dense(tiny_random(family)), 0.5)
    found = check(backend, filled(backend, rows), IDS, RECOMPUTE, APPROXIMATE, tokens=tokens, draft=draft)
    kl, again, drafted = reference(tiny_random(family), rows, tokens, draft)
    assert found.draft == tuple(drafted)
    assert found.again == tuple(again)
    assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert found.kl > 1e-3, "what is reused is wrong, and it shows"
    assert found.rows == len(RECOMPUTE) + (draft - 1) + tokens + draft
    assert found.ms > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_exact_passes(family: str) -> None:
    """Dense K/V where it was computed: nothing to find, and the answer afterwards is dense's own."""
    model = tiny_random(family)
    backend = HFBackend(model)
    generate: Any = model.generate
    options: dict[str, Any] = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 9, "do_sample": False}
    plain = generate(IDS, **options)
    cache = filled(backend, dense(tiny_random(family)))
    found = check(backend, cache, IDS, RECOMPUTE, APPROXIMATE, draft=8)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.draft == tuple(plain[0, N : N + 8].tolist())
    backend.arm(cache, IDS, RECOMPUTE[-1:])
    with backend.hooked():
        assert torch.equal(generate(IDS, past_key_values=cache, **options), plain)


def test_what_is_computed_again_stays_in_the_cache() -> None:
    """With the whole text among what is computed again, the wrong K/V is gone: the next logits are dense's."""
    model = tiny_random("llama")
    backend, rows = HFBackend(model), dense(tiny_random("llama"))
    cache = filled(backend, disturbed(rows, 0.5))
    found = check(backend, cache, IDS, RECOMPUTE, APPROXIMATE, tokens=len(APPROXIMATE))
    assert found.again == tuple(APPROXIMATE.tolist())
    again = torch.cat([RECOMPUTE, APPROXIMATE]).sort().values
    logits = backend.run(cache, IDS, again)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(input_ids=IDS).logits[0, -1], rtol=0, atol=1e-4)


def test_the_draft_ends_where_an_answer_ends() -> None:
    backend, rows = HFBackend(tiny_random("llama")), dense(tiny_random("llama"))
    whole = check(backend, filled(backend, rows), IDS, RECOMPUTE, APPROXIMATE, draft=6).draft
    assert len(whole) == 6
    ended = check(backend, filled(backend, rows), IDS, RECOMPUTE, APPROXIMATE, draft=6, stop={whole[2]}).draft
    assert ended == whole[: whole.index(whole[2]) + 1]


def test_the_draft_ends_where_rotary_tables_change() -> None:
    """Beyond 40 tokens every length has tables of its own here: only the first token can be drafted on the prompt's."""
    backend = HFBackend(tiny_random("llama-dynamic"))
    cache = filled(backend, dense(tiny_random("llama-dynamic")))
    found = check(backend, cache, IDS, RECOMPUTE, APPROXIMATE)
    assert len(found.draft) == 1
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_nothing_reused_is_nothing_to_doubt() -> None:
    backend, rows = HFBackend(tiny_random("llama")), dense(tiny_random("llama"))
    found = check(backend, filled(backend, rows), IDS, RECOMPUTE, APPROXIMATE[:0], draft=2)
    assert (found.kl, found.again, found.rows) == (0, (), len(RECOMPUTE) + 1)


def test_what_is_no_number_is_doubted() -> None:
    backend, rows = HFBackend(tiny_random("llama")), dense(tiny_random("llama"))
    rows[1][2][:, 20] = math.nan
    assert check(backend, filled(backend, rows), IDS, RECOMPUTE, APPROXIMATE).kl == math.inf
