"""The scheduler's side with requests made by hand: what is promised, to whom, how often, and what is kept."""

from __future__ import annotations

from collections import Counter
from enum import Enum
from hashlib import sha256
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvcomm.connectors.messages import News, Step
from kvcomm.connectors.scheduling import Desk
from kvcomm.connectors.settings import Settings

BLOCK = 16
numbers = count()


class Status(Enum):
    WAITING = 0
    RUNNING = 3
    FINISHED_STOPPED = 1
    FINISHED_ABORTED = 2


class FakeRequest(SimpleNamespace):
    """The fields of vLLM's request that the connector reads, with hashes that depend on salt, tokens and the hash in front."""

    def update_block_hashes(self) -> None:
        for start in range(len(self.block_hashes) * BLOCK, len(self.all_token_ids) - BLOCK + 1, BLOCK):
            before = self.block_hashes[-1] if start else (self.cache_salt or "").encode()
            self.block_hashes.append(sha256(before + repr(self.all_token_ids[start : start + BLOCK]).encode()).digest())


def request(ids: list[int], **fields: Any) -> FakeRequest:
    made = FakeRequest(
        request_id=str(next(numbers)), prompt_token_ids=ids, all_token_ids=list(ids), prompt_embeds=None, mm_features=[],
        lora_request=None, resumable=False, skip_reading_prefix_cache=False, cache_salt=None, kv_transfer_params=None,
        sampling_params=SimpleNamespace(prompt_logprobs=None, extra_args=None), num_computed_tokens=0, block_hashes=[],
        status=Status.FINISHED_STOPPED,
    )  # fmt: skip
    made.__dict__.update(fields)
    made.update_block_hashes()
    return made


def desk(ranks: int = 1, ready: bool = True, **extra: Any) -> Desk:
    settings = Settings.from_extra({"least_gain": 32, **extra})
    made = Desk(settings, "model", ranks=ranks, step_tokens=256, max_rows=8, block_size=BLOCK, prefix_caching=True)
    if ready:
        made.heard(News())
    return made


def text(seed: int, tokens: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(3, 5000, tokens).tolist()
    return ids


def live(it: Desk, made: FakeRequest, answer: list[int] | None = None, ranks: int = 1) -> Step:
    """The life of a request that is computed densely; the workers keep what they are told. The step that saves its prompt."""
    it.arrived(made)
    assert it.promised(made, 0) == 0
    it.allocated(made, [1, 2, 3], 0)
    assert not it.step({made.request_id: len(made.prompt_token_ids)}, lambda _: [1, 2, 3]).saves
    made.num_computed_tokens = len(made.prompt_token_ids)
    step = it.step({made.request_id: 1}, lambda _: [1, 2, 3])
    confirm(it, step, ranks)
    made.all_token_ids += answer or [9]
    made.num_computed_tokens = len(made.all_token_ids) - 1
    it.finished(made, [1, 2, 3])
    confirm(it, it.step({}, lambda _: []), ranks)
    return step


def confirm(it: Desk, step: Step, ranks: int = 1) -> None:
    news = News()
    for save in step.saves:
        for segment in save.segments:
            news.kept[segment.key] += ranks
    it.heard(news)


def test_a_promise_is_the_same_however_often_it_is_asked_for() -> None:
    it, known = desk(), text(1, 100)
    live(it, request(known))
    later = request([*text(2, 20), *known, *text(3, 10)])
    it.arrived(later)
    hashes = list(later.block_hashes)
    first = it.promised(later, 0)
    salted = list(later.block_hashes)
    computed = 20 + 2 + 16  # new ones, the boundary, and the prompt's last ones
    assert first == 130 - computed
    assert salted != hashes
    assert [it.promised(later, 0) for _ in range(3)] == [first] * 3
    assert later.block_hashes == salted
    it.allocated(later, [4, 5, 6], first)
    (load,) = it.step({later.request_id: computed}, lambda _: []).loads
    assert load.folded
    assert (load.start, load.end, load.holes, load.blocks) == (0, first, ((0, 22), (114, 130)), (4, 5, 6))
    assert [(p.start, p.end, p.offset) for p in load.pieces] == [(22, 114, 2)]
    assert not it.step({}, lambda _: []).loads


def test_where_the_engine_computes_less_at_once_it_computes_the_rest_itself() -> None:
    """A step without room for all: what is loaded ends where the engine begins."""
    it, known = desk(), text(1, 100)
    live(it, request(known))
    later = request([*text(2, 20), *known, *text(3, 10)])
    it.arrived(later)
    first = it.promised(later, 0)
    assert first
    it.allocated(later, [4, 5, 6], first)
    (load,) = it.step({later.request_id: 7}, lambda _: []).loads
    assert not load.folded
    assert (load.end, load.holes, load.holes_apart()) == (first, ((0, 22),), ((0, 22),))
    assert [(p.start, p.end) for p in load.pieces] == [(22, first)]
    later.num_computed_tokens = 130
    _, report = it.finished(later, [4, 5, 6])
    assert report is not None
    assert report.reused_tokens == first - 22


def test_what_the_engine_has_itself_is_weighed_and_then_stays() -> None:
    it, known = desk(), text(1, 100)
    live(it, request(known))
    later = request([*known, *text(3, 40)])
    it.arrived(later)
    hashes = list(later.block_hashes)
    assert it.promised(later, 80) == 0  # 20 more are not worth it
    assert later.block_hashes == hashes
    assert it.promised(later, 32) == 68
    assert later.block_hashes[:2] == hashes[:2]  # everybody's
    assert not set(later.block_hashes[2:]) & set(hashes)  # nobody else's
    private = list(later.block_hashes)
    assert it.promised(later, 48) == 52  # resumed: with a block of its own, of before
    assert later.block_hashes == private
    assert it.promised(later, 16) == 84  # one of everybody's has gone meanwhile: what is loaded in its place is its own
    assert later.block_hashes[:1] == hashes[:1]
    assert not set(later.block_hashes[1:]) & set(hashes)
    it.allocated(later, [4, 5], 84)
    (load,) = it.step({later.request_id: 40}, lambda _: []).loads
    assert (load.start, load.holes, [(p.start, p.offset) for p in load.pieces]) == (16, ((100, 140),), [(16, 16)])
    later.num_computed_tokens = 140
    _, report = it.finished(later, [4, 5])
    assert report is not None
    assert [(s.start, s.end, s.rung) for s in report.spans] == [(0, 16, "exact"), (16, 100, "exact")]


def test_the_engines_own_tokens_may_be_computed_in_this_very_step() -> None:
    """Then they are asked for again; text that others compute does not matter, nor does what they have computed."""
    it, known = desk(), text(1, 100)
    live(it, request(known))
    others = [request(ids, status=Status.RUNNING) for ids in (known[:60], text(7, 50))]
    for other in others:
        it.arrived(other)
        it.allocated(other, [9], 0)
    later = request([*known[:40], *text(8, 5), *known[40:], *text(3, 40)])
    it.arrived(later)
    assert it.promised(later, 32) is None
    others[0].num_computed_tokens = 16
    assert it.promised(later, 32) is None
    others[0].num_computed_tokens = 32
    assert it.promised(later, 32)
    others[0].num_computed_tokens, others[0].status = 0, Status.WAITING  # preempted: it computes nothing
    assert it.promised(later, 32)


def test_a_resumed_request_that_has_lost_the_engines_blocks() -> None:
    """What is loaded in their place is approximate, and what it leaves behind them is not called exact."""
    it, known = desk(), text(1, 100)
    live(it, request([*text(5, 40), *known]))
    later = request([*text(6, 32), *known, *text(3, 40)])
    it.arrived(later)
    first = it.promised(later, 32)
    assert first
    it.allocated(later, [4, 5], first)
    it.step({later.request_id: 172 - 32 - first}, lambda _: [4, 5])
    assert [(s.start, s.rung) for s in it._requests[later.request_id].plan.spans] == [(0, "exact"), (32, "boundary")]
    again = it.promised(later, 0)
    assert again
    it.allocated(later, [4, 5], again)
    (load,) = it.step({later.request_id: 9}, lambda _: [4, 5]).loads
    assert (load.start, load.folded, load.holes[0]) == (0, False, (0, 34))
    plan = it._requests[later.request_id].plan
    assert [(s.start, s.rung) for s in plan.spans] == [(32, "boundary")]
    assert set(range(34)) <= set(plan.recompute.tolist())


def test_where_a_step_cannot_take_all_that_is_to_be_computed() -> None:
    """What is promised ends with reused text; the holes before it are computed apart, however many tokens the engine takes."""
    it, known = desk(), text(1, 100)
    live(it, request(known))
    for new, after, promised in ((300, 9, 0), (20, 300, 120), (150, 200, 250)):  # a step computes 256
        later = request([*text(2, new), *known, *text(3, after)])
        it.arrived(later)
        assert it.promised(later, 0) == promised
        if promised:
            it.allocated(later, [4], promised)
            (load,) = it.step({later.request_id: min(256, len(later.prompt_token_ids) - promised)}, lambda _: []).loads
            assert (load.folded, load.end, load.holes) == (False, promised, ((0, new + 2),))


def test_holes_are_folded_as_far_as_there_are_rows() -> None:
    it, known = desk(), text(1, 100)
    live(it, request(known))
    made = [request([*text(n, 20), *known, *text(n + 1, 5), *known, *text(n + 2, 3)]) for n in (10, 20, 30, 40)]
    scheduled = {}
    for later in made:
        it.arrived(later)
        promised = it.promised(later, 0)
        assert promised
        it.allocated(later, [4], promised)
        scheduled[later.request_id] = len(later.prompt_token_ids) - promised
    loads = it.step(scheduled, lambda _: []).loads  # 4 sequences, and 2 more for each that is folded; 8 are allowed
    assert [load.folded for load in loads] == [True, True, False, False]


def test_nothing_of_before_a_reset_is_kept_after_it() -> None:
    it = desk()
    made = request(text(1, 100))
    it.arrived(made)
    it.allocated(made, [1], 0)
    it.reset()
    made.num_computed_tokens = 100
    assert not it.step({made.request_id: 1}, lambda _: [1]).saves
    assert it.finished(made, [1])[0] is False


def test_how_much_is_worth_it_is_what_the_workers_have_measured() -> None:
    """Where nobody has set it."""
    for given, promised in ((None, 0), (32, 75)):
        it, known = desk(least_gain=given), text(1, 100)
        it.heard(News(least_gain=90))
        live(it, request(known))
        later = request([*text(2, 20), *known])
        it.arrived(later)
        assert bool(it.promised(later, 0)) is bool(promised)
        assert it._requests[later.request_id].known.fallback == (None if promised else "little-gain")


def test_where_the_salt_does_not_take_nothing_is_promised() -> None:
    it, known = desk(), text(1, 100)
    live(it, request(known))
    later = request([*text(2, 20), *known])
    later.__dict__["update_block_hashes"] = lambda: None
    it.arrived(later)
    assert it.promised(later, 0) == 0
    assert it.promised(later, 0) == 0
    _, report = it.finished(later, [])
    assert report is not None
    assert report.fallback == "no-salt"
    assert later.cache_salt is None


def test_tenants() -> None:
    it, known = desk(), text(1, 100)
    live(it, request(known, cache_salt="one"))
    for salt, promised in (("one", 80), (None, 0), ("two", 0)):
        later = request([*text(2, 20), *known], cache_salt=salt)
        it.arrived(later)
        assert (it.promised(later, 0) or 0) >= promised
        assert bool(it.promised(later, 0)) is bool(promised)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sampling_params": None}, "not-generating"),
        ({"prompt_embeds": 1}, "prompt-embeddings"),
        ({"mm_features": [1]}, "multimodal"),
        ({"lora_request": 1}, "adapter"),
        ({"resumable": True}, "streamed-input"),
        ({"sampling_params": SimpleNamespace(prompt_logprobs=3)}, "prompt-logprobs"),
        ({"skip_reading_prefix_cache": True}, "skips-prefix-cache"),
        ({"kv_transfer_params": {"kvcomm": {"mode": "off"}}}, "mode-off"),
        ({"kv_transfer_params": {"kvcomm": "off"}}, "mode-off"),
        ({"sampling_params": SimpleNamespace(prompt_logprobs=None, extra_args={"kvcomm_mode": "off"})}, "mode-off"),
    ],
)
def test_left_alone(fields: dict[str, Any], reason: str) -> None:
    """Neither served nor learned from."""
    it, known = desk(), text(1, 100)
    live(it, request(known))
    indexed = len(it.index)
    later = request([*text(2, 20), *known], **fields)
    hashes = list(later.block_hashes)
    live(it, later, text(5, 40))
    assert later.block_hashes == hashes
    assert len(it.index) == indexed
    assert it.counters.value("fallbacks", reason) == 1


@pytest.mark.parametrize("words", [{"rule": {}}, {"mode": []}, {"mode": {}}, {"agent": [], "rule": None}, [1], {"rule": 5}])
def test_what_clients_send_never_raises(words: Any) -> None:
    it = desk()
    made = request(text(1, 40), kv_transfer_params={"kvcomm": words})
    it.arrived(made)
    assert it.promised(made, 0) == 0
    _, report = it.finished(made, [])
    assert report is not None
    assert str(report.fallback).startswith("unusable-wish: ")


def test_faults_of_ours_end_in_a_dense_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    it, known = desk(), text(1, 100)
    live(it, request(known))

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken")

    later = request([*text(2, 20), *known])
    find = it.index.find
    monkeypatch.setattr(it.index, "find", broken)
    it.arrived(later)
    assert it.promised(later, 0) == it.promised(later, 0) == 0
    _, report = it.finished(later, [])
    assert report is not None
    assert report.fallback == "fault: RuntimeError('broken')"
    assert it.counters.value("faults", "plan") == 1
    monkeypatch.setattr(it.index, "find", find)
    monkeypatch.setattr("kvcomm.connectors.scheduling.prompt_segments", broken)
    monkeypatch.setattr("kvcomm.connectors.scheduling.answer_segment", broken)
    made = request(text(7, 50))
    it.arrived(made)
    it.allocated(made, [1], 0)
    made.num_computed_tokens = 50
    assert not it.step({made.request_id: 1}, lambda _: [1]).saves
    assert it.finished(made, [1])[0] is False
    assert it.counters.value("faults", "learn") == 2


def test_budget_of_holes_is_shared_by_a_step() -> None:
    it, known = desk(max_hole_tokens=30), text(1, 100)
    live(it, request(known))
    one, two = (request([*text(n, 20), *known]) for n in (2, 3))
    for made in (one, two):
        it.arrived(made)
    promised = it.promised(one, 0)
    assert promised
    it.allocated(one, [1], promised)
    assert it.promised(two, 0) is None
    it.step({}, lambda _: [])
    assert it.promised(two, 0) == promised


def test_nothing_before_the_workers_have_reported_or_where_they_refuse() -> None:
    it, reasons = desk(ready=False), []
    for _ in range(2):
        made = request(text(1, 100))
        it.arrived(made)
        assert it.promised(made, 0) == 0
        it.allocated(made, [1], 0)
        made.num_computed_tokens = 100
        assert not it.step({made.request_id: 1}, lambda _: [1]).saves
        needed, report = it.finished(made, [1])
        assert not needed
        assert report is not None
        reasons.append(report.fallback)
        it.heard(News(refusal="no"))
    assert reasons == ["not-ready: the workers have not reported yet", "not-ready: no"]


def test_what_is_kept() -> None:
    """The unknown runs of a prompt, and of the answer what has K/V; exact up to the first moved span."""
    it, known = desk(), text(1, 100)
    (save,) = live(it, request(known, kv_transfer_params={"kvcomm": {"agent": "clerk"}}), text(9, 40)).saves
    assert [(s.ids.tolist(), s.producer, s.exact) for s in save.segments] == [(known, "clerk", True)]
    assert len(it.index) == 2
    later = request([*text(2, 20), *known, *text(3, 30)])
    it.arrived(later)
    promised = it.promised(later, 0)
    assert promised
    it.allocated(later, [7], promised)
    it.step({later.request_id: 150 - promised}, lambda _: [7])
    later.num_computed_tokens = 150
    answer = text(4, 50)
    later.all_token_ids += answer
    later.num_computed_tokens = 199
    needed, report = it.finished(later, [7, 8])
    assert needed
    assert report is not None
    assert report.reused_tokens == 98
    (save,) = it.step({}, lambda _: []).saves
    assert (save.last, save.blocks) == (True, (7, 8))
    assert [(s.ids.tolist(), s.start, s.exact) for s in save.segments] == [
        (later.prompt_token_ids[:20], 0, True),
        (later.prompt_token_ids[120:], 120, False),
        (answer[:-1], 150, False),
    ]


def test_an_aborted_request_leaves_nothing() -> None:
    it = desk()
    made = request(text(1, 100), status=Status.FINISHED_ABORTED)
    it.arrived(made)
    it.allocated(made, [1], 0)
    made.num_computed_tokens = 100
    assert it.finished(made, [1])[0] is False
    assert not it.step({}, lambda _: []).saves


def test_reset() -> None:
    """Nothing of before is known, and what was on its way to being kept is not either."""
    it, known = desk(), text(1, 100)
    live(it, request(known))
    made = request(text(5, 80))
    it.arrived(made)
    it.promised(made, 0)
    it.allocated(made, [1], 0)
    made.num_computed_tokens = 80
    step = it.step({made.request_id: 1}, lambda _: [1])
    it.reset()
    confirm(it, step)
    assert len(it.index) == 0
    after = it.step({}, lambda _: [])
    assert (after.reset, after.forget) == (True, (step.saves[0].segments[0].key,))
    assert not it.step({}, lambda _: []).reset


def test_known_only_when_every_rank_keeps_it() -> None:
    it, known = desk(ranks=2), text(1, 100)
    live(it, request(known), ranks=1)
    later = request([*text(2, 20), *known])
    it.arrived(later)
    assert it.promised(later, 0) == 0
    it.heard(News(kept=Counter({"something": 1})))
    assert it.step({}, lambda _: []).forget == ("something",)
    live(it, request(known), ranks=2)
    assert it.promised(later, 0)


def test_what_a_worker_has_lost_is_forgotten_and_a_fault_is_reported() -> None:
    it, known = desk(), text(1, 100)
    step = live(it, request(known))
    later = request([*text(2, 20), *known])
    it.arrived(later)
    promised = it.promised(later, 0)
    assert promised
    it.allocated(later, [7], promised)
    it.step({later.request_id: 30}, lambda _: [7])
    it.heard(News(gone={step.saves[0].segments[0].key}, faults=[("load", later.request_id, "lost")]))
    assert len(it.index) == 0
    assert it.promised(later, 0) == 0
    _, report = it.finished(later, [7])
    assert report is not None
    assert (report.reused_tokens, report.fallback) == (0, "fault: lost")
    assert it.counters.value("faults", "load") == 1
