"""KL and first choices: against torch's own, and from below where only the likeliest tokens are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from kvcomm.replay.measure import EARLY, Heard, agreement


def logits(seed: int, positions: int = 20, vocabulary: int = 50, wide: float = 2.0) -> Tensor:
    return wide * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


def likeliest(of: Tensor, k: int) -> Heard:
    top = of.log_softmax(-1).topk(k)
    return Heard(top.values, top.indices)


def test_whole_distributions() -> None:
    """`agreement` against torch.nn.functional.kl_div and argmax."""
    a, b = logits(0), logits(0) + 0.3 * logits(1)
    found = agreement(Heard(a), Heard(b))
    rows = kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    same = a.argmax(-1) == b.argmax(-1)
    assert found.positions == 20
    assert found.kl_first == pytest.approx(float(rows[0]), rel=1e-4)
    assert found.kl_early == pytest.approx(float(rows[:EARLY].mean()), rel=1e-4)
    assert found.kl == pytest.approx(float(rows.mean()), rel=1e-4)
    assert (found.top1_first, found.top1_early, found.top1) == (
        bool(same[0]),
        float(same[:EARLY].float().mean()),
        float(same.float().mean()),
    )
    assert 0 < found.top1 < 1
    assert [at for at, _, _ in found.differs] == torch.nonzero(~same).flatten().tolist()
    for at, theirs, mine in found.differs:
        assert (theirs, mine) == (int(a[at].argmax()), int(b[at].argmax()))


def test_nothing_differs_from_itself() -> None:
    for heard in (Heard(logits(0)), likeliest(logits(0), 10)):
        found = agreement(heard, heard)
        assert found.kl == pytest.approx(0, abs=1e-6)
        assert (found.top1, found.differs) == (1.0, ())


@pytest.mark.parametrize("k", [1, 5, 20])
def test_likeliest_tokens_give_a_lower_bound_that_grows(k: int) -> None:
    a, b = logits(2), logits(2) + 0.3 * logits(3)
    whole = agreement(Heard(a), Heard(b)).kl
    part, more = (agreement(likeliest(a, n), likeliest(b, n)) for n in (k, 50))
    assert 0 <= part.kl <= whole * (1 + 1e-5)
    assert more.kl == pytest.approx(whole, rel=1e-4)
    assert part.top1 == agreement(Heard(a), Heard(b)).top1


def test_tokens_that_a_model_never_gives() -> None:
    a, b = logits(4), logits(5)
    a[:, :10] = b[:, :10] = float("-inf")  # padding of the vocabulary
    rows = kl_div(b[:, 10:].log_softmax(-1), a[:, 10:].log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert agreement(Heard(a), Heard(b)).kl == pytest.approx(float(rows.mean()), rel=1e-4)
    b[:, 10:20] = float("-inf")  # dense has them, the policy does not: far, and still a number
    assert 1 < agreement(Heard(a), Heard(b)).kl < float("inf")


def test_shown_differences_are_bounded() -> None:
    a = logits(6, positions=100)
    assert len(agreement(Heard(a), Heard(-a), show=3).differs) == 3
