"""The fidelity benchmark's own gates: what must equal dense does, what must not does not, and what is computed is counted."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from kvcomm.anchors.anchor import Anchor
from kvcomm.backends.hf import HFBackend
from kvcomm.bench.fidelity.cases import BASES, Base, Case, case, templates
from kvcomm.bench.fidelity.early import Early
from kvcomm.bench.fidelity.methods import Method, deviation, serve
from kvcomm.errors import InputError
from kvcomm.estimators.base import Estimate, Place
from kvcomm.estimators.edges import Edges
from kvcomm.plain import PlainKV
from kvcomm.tiny.words import DOMAINS

Make = Callable[[Base], Case]


@pytest.fixture(scope="module")
def make(backend: HFBackend) -> Make:
    def made(base: Base) -> Case:
        return case(backend, templates(3, 3, (2, 6), 0)[1], base, random.Random(5), "header")

    return made


class Truth:
    """An estimator that knows: it returns the deviations of one case."""

    name = "truth"

    def __init__(self, backend: HFBackend, known: Case) -> None:
        self._by_slot = {piece.slot: deviation(backend, known, i)[1] for i, piece in enumerate(known.pieces)}

    def learn(self, anchor: Anchor, base: PlainKV, deviation: PlainKV) -> None:
        raise AssertionError

    def forget(self, anchor: Anchor) -> None:
        raise AssertionError

    def estimate(self, place: Place) -> Estimate:
        return Estimate(self._by_slot[place.slot], torch.zeros(len(place.ids)))


@pytest.mark.parametrize("base", BASES)
def test_what_must_equal_dense_does(backend: HFBackend, make: Make, base: Base) -> None:
    """Everything computed again, and true deviations added to rotated bases, against the model's own forward."""
    asked, early = make(base), Early(backend)
    for method in (Method.parse("dense"), Method.parse("rotate+random:1"), Method("truth", estimator="truth")):
        outcome = serve(backend, asked, method, {"truth": Truth(backend, asked)}, early)
        assert outcome.right is asked.dense_right
        assert outcome.kl == pytest.approx(0, abs=1e-4)
        assert outcome.top1 == 1
    if base == "isolated":  # whose fact this is stands in the header, which the base never saw
        assert serve(backend, asked, Method.parse("rotate"), {}, early).kl > 0.01


def test_reuse_and_compute_are_counted(backend: HFBackend, make: Make) -> None:
    asked, early = make("header"), Early(backend)
    outside = len(asked.ids) - asked.exact - sum(p.span.tokens for p in asked.pieces)
    rotate = serve(backend, asked, Method.parse("rotate"), {}, early)
    assert rotate.reused == pytest.approx(1 - outside / len(asked.ids))
    assert rotate.compute == pytest.approx(1 - rotate.reused)
    edges = serve(backend, asked, Method.parse("edges"), {"edges": Edges(Truth(backend, asked), 4)}, early)
    assert (edges.reused, edges.compute) == (rotate.reused, rotate.compute), "nothing is computed inside a run"
    assert 0 < edges.kl != rotate.kl
    boundary = serve(backend, asked, Method.parse("boundary:2"), {}, early)
    assert rotate.reused - boundary.reused == pytest.approx(2 * len(asked.pieces) / len(asked.ids))
    blend = serve(backend, asked, Method.parse("cacheblend:0.1"), {}, early)
    assert rotate.reused - blend.reused == pytest.approx(round(0.1 * len(asked.ids)) / len(asked.ids))
    assert blend.compute == pytest.approx((1 - blend.reused) + blend.reused / 6), "one full layer of six to choose by"


def test_the_draft_check_goes_dense_or_repairs(backend: HFBackend, make: Make) -> None:
    """Above its threshold the answer is dense's own and nothing counts as reused; below it eight tokens more are computed."""
    asked, early = make("isolated"), Early(backend)
    rotate = serve(backend, asked, Method.parse("rotate"), {}, early)
    dense = serve(backend, asked, Method.parse("rotate+draft:0"), {}, early)
    assert (dense.went_dense, dense.right, dense.reused) == (True, asked.dense_right, 0)
    assert dense.kl == pytest.approx(0, abs=1e-5)
    kept = serve(backend, asked, Method.parse("rotate+draft:inf"), {}, early)
    assert not kept.went_dense
    tokens = len(asked.ids)
    assert rotate.reused - kept.reused == pytest.approx(8 / tokens)
    assert dense.compute == pytest.approx(kept.compute + (tokens - 1) / tokens)
    assert kept.compute > rotate.compute + 8 / tokens, "drafted tokens are computed, too"
    assert list(kept.ms) == ["rotate", "estimate", "choose", "check", "pass"]


@pytest.mark.parametrize("base", BASES)
def test_pieces_are_the_prompts_text(backend: HFBackend, make: Make, base: Base) -> None:
    asked = make(base)
    for piece in asked.pieces:
        span = piece.span
        assert (span.segment.ids[span.offset : span.offset + span.tokens] == asked.ids[span.start : span.end]).all()
        assert piece.base.tokens == span.tokens
        assert piece.base.start == span.segment.start
        assert backend.tokenizer is not None
        first = str(backend.tokenizer.decode(asked.ids[span.start : span.start + 1])).strip()
        assert (first in {d.document for d in DOMAINS.values()}) is (base != "isolated")


def test_early_layers_are_the_dense_runs(backend: HFBackend, make: Make) -> None:
    """K/V of layer 1 from the first two layers alone against the whole model's."""
    asked = make("header")
    keys, values = Early(backend).kv(asked.ids)
    assert torch.allclose(keys, asked.kv.keys[1], atol=1e-5)
    assert torch.allclose(values, asked.kv.values[1], atol=1e-5)


@pytest.mark.parametrize("name", ["", "rotat", "boundary:x", "boundary", "ridge+refresh", "rotate+draft", "ours"])
def test_unknown_methods_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="a method is made of"):
        Method.parse(name)
