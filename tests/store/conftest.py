"""What tests of tiers share: segments with KV, and real services on loopback."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.record import Record

if TYPE_CHECKING:
    from tests.services import MooncakeMaster, RedisServer


def _services() -> ModuleType:
    """tests/services.py, by its path: the folder above tests/ is not on sys.path when an installed wheel is tested."""
    name = "kvcomm_test_services"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "services.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def services() -> ModuleType:
    return _services()


@pytest.fixture(scope="module")
def redis_server(services: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for a file's tests, which keep apart by their namespaces. Tests that stop one start their own."""
    with services.RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def mooncake_master(services: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeMaster]:
    """One for a file's tests, which keep apart by their namespaces. Tests that stop one start their own."""
    with services.MooncakeMaster(tmp_path_factory.mktemp("mooncake")) as master:
        yield master


@pytest.fixture(scope="session")
def made() -> Callable[..., tuple[Segment, SegmentKV]]:
    """`made(seed, tokens=5, start=3, dim=4)`: a segment and random KV of it, the same for the same arguments."""

    def make(seed: int, *, tokens: int = 5, start: int = 3, dim: int = 4) -> tuple[Segment, SegmentKV]:
        rng = np.random.default_rng(seed)
        ids = rng.integers(1, 100_000, start + tokens).astype(np.int32)
        tensors = [torch.from_numpy(rng.standard_normal((2, tokens, dim), dtype=np.float32)) for _ in range(4)]
        kv = SegmentKV(tuple(tensors[:2]), tuple(tensors[2:]), start, start + tokens)
        return Segment(ids[start:], ids[:start], "f"), kv

    return make


@pytest.fixture(scope="session")
def record(made: Callable[..., tuple[Segment, SegmentKV]]) -> Callable[..., Record]:
    """The record of what `made` makes."""
    return lambda seed, **sizes: Record.of(*made(seed, **sizes))
