"""What several benchmarks' tests need."""

from __future__ import annotations

import pytest

from kvcomm.backends.hf import HFBackend
from kvcomm.backends.loading import load
from kvcomm.tiny import FOLDER


@pytest.fixture(scope="session")
def backend() -> HFBackend:
    """The embedded model."""
    made = load(str(FOLDER), dtype="float32")
    assert isinstance(made, HFBackend)
    return made
