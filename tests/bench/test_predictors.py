"""Signs of unsafe reuse against what is known of the cases, and the document that is made of them."""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvcomm.anchors.anchor import Anchor
from kvcomm.backends.hf import HFBackend
from kvcomm.bench.fidelity import predictors
from kvcomm.bench.fidelity.cases import Case, case, templates
from kvcomm.bench.fidelity.early import Early
from kvcomm.bench.fidelity.methods import Method
from kvcomm.bench.fidelity.nearby import Nearby
from kvcomm.bench.fidelity.signs import About, Read, read
from kvcomm.codecs import codec
from kvcomm.codecs.base import pack
from kvcomm.errors import InputError
from kvcomm.estimators.base import Place
from kvcomm.estimators.paper import Paper
from kvcomm.plain import PlainKV


def plain(seed: int, tokens: int = 12) -> PlainKV:
    rng = torch.Generator().manual_seed(seed)
    keys, values = (tuple(0.05 * torch.randn(tokens, 8, generator=rng) for _ in range(3)) for _ in range(2))
    return PlainKV(keys, values)


def taught(*pupils: Nearby | Paper, count: int = 6) -> None:
    raw = codec("raw")
    for seed in range(count):
        base, nothing, around = plain(seed), np.zeros(0, np.int32), torch.full((4,), float(seed))
        packed = pack(raw, base)
        anchor = Anchor("slot", np.full(12, seed, np.int32), packed, packed, around, nothing, nothing, "model")
        for pupil in pupils:
            pupil.learn(anchor, base, base)


def place(seed: int, tokens: int = 12, around: float = 0.0) -> Place:
    return Place("slot", np.zeros(tokens, np.int32), plain(seed, tokens), torch.full((4,), around))


@pytest.mark.parametrize("tokens", [12, 5])
def test_evenness_is_what_the_papers_gate_compares(tokens: int) -> None:
    """The gate of `Paper` opens just above the number found, and not just below."""
    nearby = Nearby()
    taught(nearby)
    evenness = nearby.look(place(99, tokens)).evenness
    assert 0 < evenness < 1
    for gamma, opens in ((evenness + 1e-5, True), (evenness - 1e-5, False)):
        paper = Paper(gamma=gamma)
        taught(paper)
        assert (paper.estimate(place(99, tokens)) is not None) is opens
    assert nearby.look(place(99, 13)).evenness == math.inf, "longer than every anchor"


def test_nearness() -> None:
    nearby = Nearby()
    taught(nearby)
    seen = nearby.look(place(3, around=1.0))
    assert float(seen.tokens.max()) == pytest.approx(0, abs=1e-3), "these tokens were learned"
    assert float(nearby.look(place(50)).tokens.min()) > 0.01
    assert seen.novelty == 0
    assert nearby.look(place(3, around=7.0)).novelty == pytest.approx(2), "contexts are 2 apart; the nearest is twice as far"
    assert nearby.estimate(place(3)) is None


@pytest.fixture(scope="module")
def asked(backend: HFBackend) -> Case:
    return case(backend, templates(3, 3, (2, 6), 0)[1], "isolated", random.Random(5), "header")


def about(case: Case) -> About:
    """Doubt of 2 for every token of a piece, and no estimator."""
    doubt = torch.zeros(len(case.ids))
    for piece in case.pieces:
        doubt[piece.span.start : piece.span.end] = 2
    return About(0.25, 1.5, doubt, doubt, doubt)


def test_signs_of_reuse_that_changes_the_answer(backend: HFBackend, asked: Case) -> None:
    early = Early(backend)
    found = read(backend, asked, Method.parse("rotate"), {}, early, about(asked))
    assert found.unsafe
    assert not found.right
    assert found.signs["draft-kl"] > 0.1
    assert found.signs["paper-entropy"] == 0.25
    assert found.signs["doubt-mean"] == found.signs["doubt-max"] == 2
    assert found.signs["doubt-left"] == pytest.approx(1)
    assert found.signs["early-residual-max"] > found.signs["early-residual-mean"] > 0.1
    assert found.signs["first-margin"] < 0 < found.signs["first-entropy"]


def test_signs_of_reuse_that_changes_nothing(backend: HFBackend, asked: Case) -> None:
    """Everything computed again, against dense."""
    found = read(backend, asked, Method.parse("rotate+random:1"), {}, Early(backend), about(asked))
    assert not found.unsafe
    assert found.right is asked.dense_right
    for name in ("draft-kl", "doubt-left", "doubt-max", "kv-error-max", "early-residual-max"):
        assert found.signs[name] == pytest.approx(0, abs=1e-4)


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    predictors.add_arguments(parser)
    for name, default in (("--format", "terminal"), ("--output", None)):
        parser.add_argument(name, default=default)
    return parser.parse_args([*flags], argparse.Namespace(quiet=True))


def test_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--templates", "2", "--requests", "8", "--anchors", "7", "--documents", "3", "--fillers", "2", "6"]
    args = arguments(*sizes, "--methods", "rotate", "select+refresh:0.1")
    args.output = tmp_path
    assert predictors.run(args) == 0
    assert "draft-kl" in capsys.readouterr().out
    assert (tmp_path / "predictors.json").exists()
    doc: dict[str, Any] = predictors.measure(args)
    rows = [r for r in doc["predictors"] if r["method"] == "rotate"]
    assert {r["method"] for r in doc["predictors"]} == {"rotate", "select+refresh:0.1"}
    assert {"paper-entropy", "distance-max", "doubt-left", "context-novelty", "early-residual-mean", "draft-kl"} <= {
        r["predictor"] for r in rows
    }
    assert 0 < rows[0]["unsafe_rate"] < 1
    for row in rows:
        assert row["auc_low"] <= row["auc"] <= row["auc_high"]
        assert [k["share"] for k in row["kept"]] == [0.5, 0.7, 0.9]
    (kl,) = (r for r in rows if r["predictor"] == "draft-kl")
    assert kl["auc"] > 0.7


def test_without_unsafe_requests_there_is_no_auc() -> None:
    """Rows of a method that never fails, printed too."""
    safe = [Read(False, True, {"draft-kl": x}) for x in (0.0, 1.0)]
    (row,) = predictors.rows("dense", safe)
    assert (row["auc"], row["auc_low"], row["unsafe_rate"]) == (None, None, 0)
    assert "draft-kl" in predictors.table({"predictors": [row], "requests": 2})


def test_too_few_requests_are_refused() -> None:
    with pytest.raises(InputError, match="at least one request per template"):
        predictors.measure(arguments("--templates", "4", "--requests", "3"))
