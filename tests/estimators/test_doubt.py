"""The rule that chooses tokens, against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvcomm.estimators.doubt import far_above


@pytest.mark.parametrize("times", [0.0, 0.5, 2.0, 4.0])
@pytest.mark.parametrize("tokens", [1, 9, 10, 500])
def test_against_numpy(tokens: int, times: float) -> None:
    doubt = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))
    lower = np.sort(doubt.numpy())[tokens // 10]
    np.testing.assert_array_equal(far_above(doubt, times).numpy(), doubt.numpy() > times * lower)


def test_what_is_not_doubted_counts_for_nothing() -> None:
    doubt = torch.tensor([0.0] * 90 + [1.0] * 9 + [5.0])
    assert far_above(doubt, 4.0).nonzero().flatten().tolist() == [99]
    assert far_above(doubt, 0.0).sum() == 10
    assert not far_above(torch.zeros(5), 0.0).any()
    assert not far_above(doubt, float("inf")).any()
