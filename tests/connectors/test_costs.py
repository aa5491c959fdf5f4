"""From measured milliseconds to a number of tokens."""

from __future__ import annotations

import pytest

from kvcomm.connectors.costs import Costs


@pytest.mark.parametrize(
    ("costs", "least"),
    [
        (Costs(1.0, 0.1, 9.0), 10),  # 10 tokens save 9 ms
        (Costs(1.0, 0.1, 9.1), 11),
        (Costs(0.5, 0.1, 0.0), 0),
        (Costs(0.1, 0.1, 5.0), None),
        (Costs(0.05, 0.1, 5.0), None),
    ],
)
def test_from_how_many_tokens_on(costs: Costs, least: int | None) -> None:
    assert costs.least_gain == least
    assert ("never" in str(costs)) == (least is None)
