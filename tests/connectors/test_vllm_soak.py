"""Many mixed requests, few blocks, a small store; what `kvcomm bench soak` cannot look at is looked at here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from kvcomm.bench import soak
from kvcomm.connectors.local import LocalEngine

pytest.importorskip("vllm")

REQUESTS = 150
PER_TOKEN = 4 * 2 * 2 * 64 * 4  # bytes of K/V: layers, keys and values, heads, dim, float32


def test_soak(start_engine: Callable[..., Iterator[Any]]) -> None:
    """No request fails, dense answers are those of a Hugging Face forward, reuse does not decay, memory is bounded."""
    store_bytes = soak.STORE_TOKENS * PER_TOKEN
    engines = start_engine(
        extra={"store_bytes": store_bytes},
        max_model_len=soak.LIMITS["tokens"],
        num_gpu_blocks_override=soak.LIMITS["num_gpu_blocks_override"],
        max_num_seqs=soak.LIMITS["max_num_seqs"],
    )
    engine = next(engines)
    preempted, finished = 0, engine.desk.finished

    def noting(request: Any, blocks: list[int]) -> Any:
        nonlocal preempted
        preempted += request.num_preemptions
        return finished(request, blocks)

    engine.desk.finished = noting
    asked = soak.Soak(LocalEngine(engine.llm, count(), has_tokenizer=False), REQUESTS, seed=3).run()

    ended = Counter(a.ended for a in asked)
    assert ended["length"] + ended["cancelled"] == len(asked) == REQUESTS
    assert ended["cancelled"] > 0
    assert preempted > 0
    assert engine.desk.counters.value("faults", "give-up") == engine.desk.counters.value("faults", "keep") == 0
    dense = [a for a in asked if a.kind == "dense"]
    assert len(dense) > REQUESTS / 10
    for a in dense:
        tokens, first = engine.oracle.answer(a.ids, None, len(a.answer))
        assert list(a.answer) == tokens
        assert abs(first[tokens[0]].item() - a.logprobs[0]) < 1e-4

    reports = [a.report for a in asked if a.kind == "reused"]
    third = len(reports) // 3
    early, late = soak.reuse(reports[third // 2 : third]), soak.reuse(reports[-third:])
    assert late > min(0.4, 0.8 * early)
    store = engine.worker._store
    store.check_integrity()
    engine.desk.index.check_integrity()
    assert store.nbytes <= store_bytes
    assert {s.key for s in store.segments()} >= set(engine.desk.index._records)
    assert not engine.desk._requests
    next(engines, None)
