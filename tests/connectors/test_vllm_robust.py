"""What must hold whatever happens: exact caches stay exact, tenants apart, faults end in dense answers. On a real vLLM."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest

from kvcomm.connectors import vllm_compat
from kvcomm.connectors.holes import HolePass

pytest.importorskip("vllm")

Text = Callable[[int], list[int]]
BLOCK = 128  # tokens of a block of vLLM's CPU cache


@pytest.fixture
def pair(engine: Any, text: Text) -> tuple[list[int], list[int]]:
    """Two texts that the engine has seen, the second behind other text."""
    a, b = text(310), text(205)
    engine.ask([*a, *b])
    return a, b


def test_dense_after_reused(engine: Any, pair: tuple[list[int], list[int]]) -> None:
    """A request that must not be touched reads vLLM's prefix cache after an approximate one with the same tokens."""
    prompt = [*pair[1], *pair[0]]
    (approximate,) = engine.ask(prompt)
    assert engine.plan(approximate).reused > 400
    (dense,) = engine.ask(prompt, mode="off")
    assert engine.error(dense) < 1e-4
    assert dense.num_cached_tokens == 0
    assert dense.kv_transfer_params["kvcomm"]["fallback"] == "mode-off"


def test_without_the_salt_it_would_be_poisoned(
    engine: Any, pair: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the test above."""
    monkeypatch.setattr(vllm_compat, "salt", lambda request, kept: True)
    prompt = [*pair[1], *pair[0]]
    engine.ask(prompt)
    (dense,) = engine.ask(prompt, mode="off")
    assert dense.num_cached_tokens > 0
    assert engine.error(dense) > 1e-2


def test_no_salt_no_promise(engine: Any, pair: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_compat, "salt", lambda request, kept: False)
    (output,) = engine.ask([*pair[1], *pair[0]])
    assert engine.error(output) < 1e-4
    assert output.num_cached_tokens == 0


def test_tenants_do_not_meet(engine: Any, text: Text) -> None:
    a, b = text(200), text(150)
    engine.ask([*a, *b], salts=["one"])
    theirs, nobodys, own = engine.ask([*b, *a], [*b, *a], [*b, *a], salts=["two", None, "one"])
    assert engine.plan(theirs).reused == engine.plan(nobodys).reused == 0
    assert engine.plan(own).reused > 300
    engine.check(theirs, nobodys, own)


def test_exact_rule_and_shadow(engine: Any, pair: tuple[list[int], list[int]]) -> None:
    a, b = pair
    for words, reason in (({"rule": "exact"}, "nothing-exact"), ({"mode": "shadow"}, "shadow")):
        (output,) = engine.ask([*b, *a], **words)
        assert engine.error(output) < 1e-4
        assert engine.plan(output).fallback == reason
        engine.llm.reset_prefix_cache()


def test_an_unusable_wish_is_answered_densely(engine: Any, pair: tuple[list[int], list[int]]) -> None:
    (output,) = engine.ask([*pair[1], *pair[0]], mode="perhaps")
    assert engine.error(output) < 1e-4
    assert output.kv_transfer_params["kvcomm"]["fallback"].startswith("unusable-wish: mode is 'perhaps'")


@pytest.mark.parametrize("how", ["missing", "corrupt"])
def test_lost_between_promise_and_load(engine: Any, text: Text, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The segment leaves the store, or is written to, after the scheduler has promised it: dense, counted, with the reason;
    its neighbours in the batch keep theirs.
    """
    a, b, c = text(200), text(150), text(180)
    engine.ask([*a, *b], [*text(11), *c])
    store, faults = engine.worker._store, engine.desk.counters.value("faults", "load")
    lost = next(s.key for s in store.segments() if s.ids.tolist() == [*a, *b])
    if how == "missing":
        store.remove(lost)
    else:
        store.get(lost).keys[1].add_(1.0)
    hurt, other, dense = engine.ask([*b, *a], [*text(5), *c], text(100))
    engine.check(hurt, other, dense)
    assert engine.error(hurt) < 1e-4
    assert engine.plan(hurt).fallback.startswith("fault: ")
    assert engine.plan(other).reused > 150
    assert engine.desk.counters.value("faults", "load") == faults + 1
    assert lost not in engine.desk.index


def test_holes_that_fail_are_reported_to_the_engine(
    engine: Any, pair: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing computes them: with the policy "recompute" the engine computes the request."""

    def broken(self: HolePass, *given: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(HolePass, "fold", broken)
    monkeypatch.setattr(HolePass, "run", broken)
    (output,) = engine.ask([*pair[1], *pair[0]])
    assert engine.error(output) < 1e-4
    assert engine.plan(output).fallback.startswith("fault: ")
    monkeypatch.undo()
    (again,) = engine.ask([*pair[1], *pair[0]])
    assert engine.plan(again).reused > 400
    engine.check(again)


def test_nothing_of_a_prompt_with_logprobs(engine: Any, pair: tuple[list[int], list[int]]) -> None:
    from vllm import SamplingParams

    prompt = [*pair[1], *pair[0]]
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, detokenize=False)
    (output,) = engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert output.kv_transfer_params["kvcomm"]["fallback"] == "prompt-logprobs"
    assert len(output.prompt_logprobs) == len(prompt)


@pytest.mark.parametrize("how", ["not folded", "skipped", "last first"])
def test_the_oracle_sees_wrong_holes(
    engine: Any, text: Text, pair: tuple[list[int], list[int]], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative controls: the engine computes its last tokens instead, no pass at all, one pass per hole in the wrong order."""
    run = HolePass.run

    def wrong(self: HolePass, rows: Any) -> None:
        for row in [] if how == "skipped" else reversed(rows):
            run(self, [row])

    monkeypatch.setattr(HolePass, "fold", lambda self, _, loads: {load.request_id for load in loads if how == "not folded"})
    monkeypatch.setattr(HolePass, "run", wrong)
    (output,) = engine.ask([*pair[1], *text(5), *pair[0], *text(3), *pair[1]])
    plan = engine.plan(output)
    assert len(plan.spans) == 3
    assert engine.error(output, plan) > 1e-3


def test_an_engine_that_does_not_compute_what_is_folded_into_it_is_found_out(
    engine: Any, pair: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first use: that request is computed again, and holes are computed apart from then on."""
    worker = engine.worker
    monkeypatch.setattr(worker, "_judged", False)
    monkeypatch.setattr(worker, "_folds", True)
    with monkeypatch.context() as lying:
        lying.setattr(vllm_compat.Runner, "fold", lambda self, _, wanted: set(wanted))
        (output,) = engine.ask([*pair[1], *pair[0]])
    assert engine.error(output) < 1e-4
    assert "its forward leaves other K/V" in engine.plan(output).fallback
    passes = worker._holes.passes
    (again,) = engine.ask([*pair[1], *pair[0]])
    engine.check(again)
    assert worker._holes.passes == passes + 1


def test_folding_that_fails_is_done_apart(
    engine: Any, pair: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: HolePass, *given: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(HolePass, "fold", broken)
    faults, passes = engine.desk.counters.value("faults", "fold"), engine.worker._holes.passes
    (output,) = engine.ask([*pair[1], *pair[0]])
    engine.check(output)
    assert engine.plan(output).reused > 400
    assert engine.desk.counters.value("faults", "fold") == faults + 1
    assert engine.worker._holes.passes == passes + 1


def test_the_engines_own_blocks_stay(engine: Any, text: Text, pair: tuple[list[int], list[int]]) -> None:
    """What vLLM's prefix cache holds exactly is not loaded, and what is loaded behind it is nobody's but the request's."""
    a, b = pair
    own = text(BLOCK * 2)
    engine.ask([*own, *text(9)], mode="off")
    before = engine.worker._holes.folded
    (output,) = engine.ask([*own, *b, *a])
    engine.check(output)
    assert engine.worker._holes.folded == before + 1
    plan = engine.plan(output)
    assert (plan.spans[0].rung, plan.spans[0].start, plan.spans[0].end) == ("exact", 0, len(own))
    assert output.num_cached_tokens == plan.reused
    (dense,) = engine.ask([*own, *b, *a], mode="off")
    assert dense.num_cached_tokens == len(own)
    assert engine.error(dense) < 1e-4


def test_asking_changes_nothing(engine: Any, pair: tuple[list[int], list[int]]) -> None:
    """The scheduler may ask as often as it likes."""
    desk = engine.desk
    promised = desk.promised

    def three_times(request: Any, local: int) -> int | None:
        answers = [promised(request, local) for _ in range(3)]
        if answers[0] is not None:
            assert answers[1] == answers[2] == answers[0]
        final: int | None = answers[-1]
        return final if answers[0] is not None else None

    desk.promised = three_times
    try:
        outputs = engine.ask([*pair[1], *pair[0]], [*pair[0][:100], *pair[1]])
    finally:
        del desk.promised
    engine.check(*outputs)
    assert all(engine.plan(o).reused > 0 for o in outputs)


def test_reset(engine: Any, pair: tuple[list[int], list[int]]) -> None:
    """vLLM's own way to empty all caches empties ours."""
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    (output,) = engine.ask([*pair[1], *pair[0]])
    engine.check(output)
    assert engine.plan(output).reused == 0
    assert len(engine.worker._store.segments()) == 1


@pytest.mark.parametrize("folds", [True, False], ids=["folded", "apart"])
def test_fuzz(engine: Any, text: Text, folds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random prompts of known runs and new text, four at a time beside a dense one; every answer is the oracle's."""
    monkeypatch.setattr(engine.worker, "_folds", folds)
    before = engine.worker._holes.folded
    rng = np.random.default_rng(7)
    known = [text(int(n)) for n in (150, 97, 61, 203)]
    engine.ask([*chain(*known)])
    reused = holes = 0
    for _ in range(8):
        prompts = []
        for _ in range(4):
            prompt: list[int] = []
            for _ in range(rng.integers(1, 9)):
                if rng.random() < 0.45:
                    prompt += text(int(rng.choice([1, 1, 2, 2, 3, 5, 17])))
                run = known[rng.integers(4)]
                start = int(rng.integers(len(run) - 1))
                prompt += run[start : start + int(rng.integers(1, len(run) - start + 1))]
            prompts.append(prompt)
        outputs = engine.ask(*prompts[:2], text(int(rng.integers(100, 300))), *prompts[2:])
        for output in outputs:
            plan = engine.plan(output)
            engine.check(output)
            reused += plan.reused
            holes += len(plan.recompute)
    assert reused > (3000 if folds else 2500)
    assert holes > 500
    assert (engine.worker._holes.folded > before + 15) == folds
