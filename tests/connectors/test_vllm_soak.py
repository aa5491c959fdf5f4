"""Many mixed requests, few blocks, a small store: reused, dense, other tenants, cancelled, preempted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "150"))  # the long run of docs/log.md had 2,000
PER_TOKEN = 4 * 2 * 2 * 64 * 4  # bytes of K/V: layers, keys and values, heads, dim, float32
STORE_TOKENS = 9000


def test_soak(start_engine: Callable[..., Iterator[Any]]) -> None:
    """No request fails, no dense answer differs from the oracle's, reuse does not decay, and memory stays bounded."""
    rng = np.random.default_rng(3)
    engines = start_engine(
        extra={"store_bytes": STORE_TOKENS * PER_TOKEN}, num_gpu_blocks_override=15, max_model_len=1024, max_num_seqs=8
    )
    engine = next(engines)
    core = engine.llm.llm_engine
    documents = [_text(rng, int(n)) for n in rng.integers(60, 220, 12)]
    kinds, ended, preempted = {}, Counter[str](), 0
    prompts: dict[str, list[int]] = {}
    outputs: dict[str, Any] = {}
    finished = engine.desk.finished

    def noting(request: Any, blocks: list[int]) -> Any:
        nonlocal preempted
        preempted += request.num_preemptions
        return finished(request, blocks)

    engine.desk.finished = noting
    sent = 0
    while sent < REQUESTS or core.has_unfinished_requests():
        while sent < REQUESTS and len(prompts) - len(outputs) < 10:
            name = f"soak-{sent}"
            kinds[name], prompts[name] = _send(engine, rng, name, documents)
            sent += 1
            if rng.random() < 0.02:  # the world moves on: a document is replaced
                documents[rng.integers(len(documents))] = _text(rng, int(rng.integers(60, 220)))
        for output in core.step():
            if output.finished:
                outputs[output.request_id] = output
                ended[output.outputs[0].finish_reason] += 1
        living = [name for name in prompts if name not in outputs and kinds[name] == "cancelled"]
        if living and rng.random() < 0.3:
            core.abort_request([living[0]])
            outputs[living[0]] = None
            ended["cancelled"] += 1

    assert ended["error"] == 0
    assert len(outputs) == REQUESTS
    assert ended["length"] + ended["cancelled"] + ended["abort"] == REQUESTS
    assert preempted > 0
    assert engine.desk.counters.value("faults", "give-up") == engine.desk.counters.value("faults", "keep") == 0
    dense = [o for name, o in outputs.items() if kinds[name] == "dense"]
    assert len(dense) > REQUESTS / 10
    assert max(engine.error(output) for output in dense) < 1e-4

    report = [outputs[name].kv_transfer_params["kvcomm"] for name in prompts if kinds[name] == "reused"]
    third = len(report) // 3
    early, late = (
        sum(r["reused_tokens"] for r in part) / sum(r["prompt_tokens"] for r in part)
        for part in (report[third // 2 : third], report[-third:])
    )
    print(f"soak: {dict(ended)}, {preempted} preemptions, reuse {early:.3f} early and {late:.3f} late")
    assert late > min(0.4, 0.8 * early)
    store = engine.worker._store
    store.check_integrity()
    engine.desk.index.check_integrity()
    assert store.nbytes <= STORE_TOKENS * PER_TOKEN
    assert {s.key for s in store.segments()} >= set(engine.desk.index._records)
    assert not engine.desk._requests
    next(engines, None)


def _send(engine: Any, rng: np.random.Generator, name: str, documents: list[list[int]]) -> tuple[str, list[int]]:
    """One request of a random kind; its kind and prompt."""
    from vllm import SamplingParams

    kind = str(rng.choice(["reused", "dense", "tenant", "cancelled"], p=[0.55, 0.2, 0.15, 0.1]))
    prompt = _text(rng, int(rng.integers(1, 40)))
    for i in rng.permutation(len(documents))[: rng.integers(1, 4)]:
        prompt += documents[i] + _text(rng, int(rng.integers(0, 6)))
    words = {"mode": "off"} if kind == "dense" else {"agent": f"agent {rng.integers(5)}"}
    params = SamplingParams(
        temperature=0, max_tokens=int(rng.integers(2, 120)), ignore_eos=True, detokenize=False, logprobs=20,
        extra_args={"kv_transfer_params": {"kvcomm": words}},
    )  # fmt: skip
    given: dict[str, Any] = {"prompt_token_ids": prompt}
    if kind == "tenant":
        given["cache_salt"] = f"tenant {rng.integers(2)}"
    engine.llm.llm_engine.add_request(name, given, params)
    return kind, prompt


def _text(rng: np.random.Generator, tokens: int) -> list[int]:
    ids: list[int] = rng.integers(3, 512, tokens).tolist()
    return ids
