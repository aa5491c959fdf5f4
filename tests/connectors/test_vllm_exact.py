"""Answers of a real vLLM with the connector, against Hugging Face forwards over K/V put together by hand (`Oracle`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

Text = Callable[[int], list[int]]
BLOCK = 128  # tokens of a block of vLLM's CPU cache


@pytest.fixture
def parts(engine: Any, text: Text) -> dict[str, list[int]]:
    """Four texts that the engine has seen one behind the other."""
    known = {"A": text(150), "B": text(97), "C": text(61), "D": text(203)}
    first, _ = engine.ask([*chain(*known.values())], text(9))
    engine.check(first)
    assert engine.plan(first).fallback is not None
    return known


def test_what_is_kept_is_what_a_dense_forward_caches(engine: Any, parts: dict[str, list[int]]) -> None:
    """The store's K/V of a prompt against Hugging Face's cache."""
    prompt = [*chain(*parts.values())]
    store = engine.worker._store
    found = [s for s in store.segments() if s.ids.tolist() == prompt]
    assert len(found) == 1
    kept = store.get(found[0].key)
    keys, values = engine.oracle.kv(prompt)
    for layer in range(len(keys)):
        np.testing.assert_allclose(kept.keys[layer], keys[layer], atol=1e-4)
        np.testing.assert_allclose(kept.values[layer], values[layer], atol=1e-4)


@pytest.mark.parametrize(
    "order", ["DBA", "B", "CCDAB", "AD", "5D5B", "1A2C1B", "40D3A50C", "D30", "CB17"], ids=lambda order: order
)
def test_moved_and_reordered(engine: Any, text: Text, parts: dict[str, list[int]], order: str) -> None:
    """Letters are known texts, numbers so many new tokens."""
    prompt: list[int] = []
    for piece in re.findall(r"[A-Z]|\d+", order):
        prompt += parts[piece] if piece.isalpha() else text(int(piece))
    (output,) = engine.ask(prompt)
    plan = engine.plan(output)
    engine.check(output)
    known = sum(len(parts[piece]) for piece in order if piece.isalpha())
    assert plan.reused > 0.6 * known
    assert output.kv_transfer_params["kvcomm"]["reused_tokens"] == plan.reused
    assert output.num_cached_tokens < len(prompt)


def test_the_same_prompt_again(engine: Any, parts: dict[str, list[int]]) -> None:
    """vLLM's own cache has whole blocks of it; ours has all of it, and gives what a dense forward gives."""
    prompt = [*chain(*parts.values())]
    (output,) = engine.ask(prompt)
    assert engine.error(output) < 1e-4


@pytest.mark.parametrize("tokens", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 259, 331])
def test_lengths(engine: Any, parts: dict[str, list[int]], tokens: int) -> None:
    prompt = [*parts["D"], *parts["A"]][:tokens]
    (output,) = engine.ask(prompt)
    engine.check(output)
    assert (engine.plan(output).reused > 0) == (tokens > 2)


def test_four_at_once(engine: Any, text: Text, parts: dict[str, list[int]]) -> None:
    """Two that reuse, one that cannot, one that is new, in one batch."""
    a, b = [*parts["D"], *parts["C"]], [*text(7), *parts["B"], *text(3), *parts["A"]]
    outputs = engine.ask(a, text(301), b, text(140))
    engine.check(*outputs)
    assert [engine.plan(o).reused > 0 for o in outputs] == [True, False, True, False]


def test_an_answer_is_read_by_others(engine: Any, text: Text) -> None:
    """The K/V of generated tokens moves into another prompt; the last one sampled has none and is computed."""
    question = text(70)
    (said,) = engine.ask(question, new=40)
    engine.ask(text(5))  # a step for what was left to do
    answer = list(said.outputs[0].token_ids)
    (output,) = engine.ask([*text(33), *answer, *text(20)])
    plan = engine.plan(output)
    engine.check(output)
    assert plan.reused >= len(answer) - 1 - engine.desk._settings.config.boundary
