"""Texts prefilled alone, and what anchors do for them, on a real vLLM, against Hugging Face forwards over K/V put together by
hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kvcomm.codecs import codec, unpack
from kvcomm.estimators import Estimate, Place
from kvcomm.plain import PlainKV

pytest.importorskip("vllm")

Text = Callable[[int], list[int]]
Start = Callable[..., Iterator[Any]]
AGENTS = ("clerk", "critic")


@pytest.fixture(scope="module")
def engine(start_engine: Start) -> Iterator[Any]:
    yield from start_engine(extra={"anchor_codec": "raw", "explore": 0.0})


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames:
        assert request.getfixturevalue("engine").llm.reset_prefix_cache(reset_connector=True)


class Known:
    """In place of what was learned: estimates that are given."""

    def __init__(self, estimate: Callable[[str, Place], Estimate | None]) -> None:
        self.estimate = estimate


def plainly(place: Place) -> Estimate:
    """Nothing is added, and no token doubted more than others."""
    return Estimate(None, torch.ones(len(place.ids)))


def prefill(engine: Any, *texts: Sequence[int], tenant: str | None = None) -> None:
    outputs = engine.ask(*texts, new=1, salts=[tenant] * len(texts), prefill=True)
    assert {o.kv_transfer_params["kvcomm"]["fallback"] for o in outputs} == {"prefill"}
    tick(engine)


def tick(engine: Any) -> None:
    """What is to be learned is learned, and a step tells the scheduler's side."""
    engine.worker._adviser.wait()
    engine.ask([3, 4, 5], mode="off", new=1)


def knowing(engine: Any, estimate: Callable[[str, Place], Estimate | None], tenant: str = "") -> None:
    """As if that had been learned."""
    tick(engine)  # a reset has reached the worker
    engine.worker._adviser._corrector._pupils = Known(estimate)
    engine.desk._foresight._able.add(tenant)


def said(output: Any) -> dict[str, Any]:
    words: dict[str, Any] = output.kv_transfer_params["kvcomm"]
    return words


# --- against K/V put together by hand ----------------------------------------------------------------------------------------


def test_deviation_added(engine: Any, text: Text) -> None:
    """Random deviations; the answer is that of a forward over K/V to which they were added by hand, and of no other."""
    a, b = text(310), text(90)
    prefill(engine, a, b)
    added: dict[bytes, PlainKV] = {}

    def estimate(tenant: str, place: Place) -> Estimate:
        deviation = place.base.map(lambda x: 0.5 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
        added[place.ids.tobytes()] = deviation
        doubt = torch.ones(len(place.ids))
        doubt[[20, 21, 50]] = 100.0
        return Estimate(deviation, doubt)

    knowing(engine, estimate)
    prompts = [*text(40), *a, *text(30), *b, *text(25)], [*text(7), *b[5:], *text(30)]
    for output in engine.ask(*prompts, agent="critic"):
        plan = engine.plan(output)
        by_start = {span.start: added[output_ids(output)[span.start : span.end].tobytes()] for span in plan.spans}
        assert {span.rung for span in plan.spans} == {"anchor"}
        assert said(output)["tokens_by_rung"]["anchor"] == plan.reused > 70
        assert engine.error(output, plan, by_start) < 1e-4
        assert engine.error(output, plan) > 1e-2
        assert said(output)["estimate_ms"] > 0


def output_ids(output: Any) -> Any:
    return np.asarray(output.prompt_token_ids, dtype=np.int32)


def test_the_doubted_tokens_are_computed_again(engine: Any, text: Text) -> None:
    a, doubted = text(200), [3, 77, 78, 150]
    prefill(engine, a)

    def estimate(tenant: str, place: Place) -> Estimate:
        doubt = torch.ones(len(place.ids))
        doubt[doubted] = 50.0
        return Estimate(None, doubt)

    knowing(engine, estimate)
    (output,) = engine.ask([*text(50), *a, *text(30)])
    plan = engine.plan(output)
    engine.check(output)
    again = [int(i) - 50 for i in plan.recompute if 50 <= i < 250]
    assert again == [0, 1, *doubted]
    assert said(output)["computed_tokens"] == 80 + len(again)


@pytest.mark.parametrize("how", ["raises", "deviation of NaN", "doubt of NaN"])
def test_a_failing_estimator_is_a_dense_answer(engine: Any, text: Text, how: str) -> None:
    a = text(150)
    prefill(engine, a)

    def estimate(tenant: str, place: Place) -> Estimate:
        if how == "raises":
            raise RuntimeError("no idea")
        marks = torch.ones(len(place.ids))
        if how == "doubt of NaN":
            return Estimate(None, marks * float("nan"))
        return Estimate(place.base.map(lambda x: x * float("nan")), marks)

    knowing(engine, estimate)
    before = engine.desk.counters.value("faults", "estimate")
    (output,) = engine.ask([*text(40), *a, *text(20)])
    assert engine.error(output) < 1e-4
    assert said(output)["reused_tokens"] == 0
    assert said(output)["fallback"].startswith("fault: ")
    assert engine.desk.counters.value("faults", "estimate") == before + 1


def test_an_anchor_is_the_difference_to_the_dense_kv(engine: Any, text: Text) -> None:
    """A request that waits is dense, and leaves an anchor: base and deviation, brought to where the text stood, are what
    Hugging Face caches there.
    """
    a, front = text(120), text(33)
    prefill(engine, a)
    prompt = [*front, *a, *text(20)]
    (output,) = engine.ask(prompt, agent="clerk")
    assert said(output)["fallback"] == "learning"
    assert engine.error(output) < 1e-4
    tick(engine)
    corrector = engine.worker._adviser._corrector
    (anchor,) = corrector.pool.match("clerk", corrector.model.fingerprint)
    assert (anchor.ids.tolist(), anchor.consumer_context.tolist(), anchor.producer_context.tolist()) == (a, front, [])
    base, deviation = (unpack(codec("raw"), kv) for kv in (anchor.base, anchor.deviation))
    keys, values = engine.oracle.kv(prompt)
    alone, _ = engine.oracle.kv(a)
    where = torch.arange(33, 153)
    for layer in range(len(keys)):
        real = engine.oracle.placed(base.keys[layer] + deviation.keys[layer], where)
        torch.testing.assert_close(real, keys[layer, :, where], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(engine.oracle.placed(base.keys[layer], where - 33), alone[layer], atol=1e-4, rtol=1e-4)
        real = (base.values[layer] + deviation.values[layer]).view(len(a), keys.shape[1], -1).transpose(0, 1)
        torch.testing.assert_close(real, values[layer, :, where], atol=1e-4, rtol=1e-4)


def test_what_estimators_say_too_little_of_is_learned_from(engine: Any, text: Text) -> None:
    a = text(120)
    prefill(engine, a)
    knowing(engine, lambda tenant, place: None)
    (output,) = engine.ask([*text(40), *a, *text(20)], agent="clerk")
    assert engine.error(output) < 1e-4
    assert said(output)["fallback"] == "learning"
    tick(engine)
    assert len(engine.worker._adviser._corrector.pool) == 1
    assert ("", "clerk") in engine.desk._foresight._unable


# --- who is kept from whom ---------------------------------------------------------------------------------------------------


def test_tenants_do_not_meet(engine: Any, text: Text) -> None:
    """One that prefills waits, the other does not, and finds nothing of it."""
    a, b = text(120), text(110)
    prefill(engine, a, tenant="one")
    engine.ask([*text(30), *b], salts=["two"])
    asked = []

    def estimate(tenant: str, place: Place) -> Estimate:
        asked.append(tenant)
        return plainly(place)

    knowing(engine, estimate, "one")
    theirs, other = engine.ask([*text(40), *a, *text(20)], [*text(40), *b, *a, *text(20)], salts=["one", "two"])
    engine.check(theirs, other)
    assert [span.rung for span in engine.plan(theirs).spans] == ["anchor"]
    assert [(span.rung, span.tokens) for span in engine.plan(other).spans] == [("boundary", 110)]
    assert asked == ["one"]
    (waits,) = engine.ask([*text(40), *a, *text(20)], salts=["two"])  # the one before has left it there
    assert said(waits)["tokens_by_rung"]["boundary"] > 0
    assert asked == ["one"]


def test_reset(engine: Any, text: Text) -> None:
    """vLLM's own way to empty all caches forgets texts, anchors and who waits."""
    a = text(120)
    prefill(engine, a)
    engine.ask([*text(30), *a, *text(20)])
    tick(engine)
    adviser = engine.worker._adviser
    assert len(adviser._corrector.pool) == 1
    knowing(engine, lambda tenant, place: plainly(place))
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    (output,) = engine.ask([*text(30), *a, *text(20)])
    assert said(output)["fallback"] == "nothing-known"
    assert not len(adviser._corrector.pool)
    assert not engine.desk._foresight._able
    (output,) = engine.ask([*text(40), *a, *text(20)])
    assert [span.rung for span in engine.plan(output).spans] == ["boundary"]


def test_shadow_is_dense_and_taught_from(engine: Any, text: Text) -> None:
    a = text(120)
    prefill(engine, a)
    knowing(engine, lambda tenant, place: plainly(place))
    (output,) = engine.ask([*text(40), *a, *text(20)], mode="shadow")
    assert engine.error(output) < 1e-4
    assert said(output)["fallback"] == "shadow"
    tick(engine)
    assert len(engine.worker._adviser._corrector.pool) == 1


def test_lost_while_the_answer_is_on_its_way(engine: Any, text: Text) -> None:
    """The base leaves the store behind the scheduler's back: dense, counted; then it is known no more."""
    a = text(120)
    prefill(engine, a)
    knowing(engine, lambda tenant, place: Estimate(place.base, torch.ones(len(place.ids))))
    for segment in engine.worker._store.segments():
        engine.worker._store.remove(segment.key)
    (output,) = engine.ask([*text(40), *a, *text(20)])
    assert engine.error(output) < 1e-4
    assert said(output)["fallback"].startswith("fault: ")
