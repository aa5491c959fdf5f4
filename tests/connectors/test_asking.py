"""The scheduler's side of anchors, with requests and workers made by hand: who waits, is asked about, learned from, served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvcomm.connectors import asking
from kvcomm.connectors.messages import Answer, Ask, News, Step
from kvcomm.connectors.scheduling import Desk
from kvcomm.connectors.settings import Settings

numbers = count()


class FakeRequest(SimpleNamespace):
    """The fields of vLLM's request that the connector reads."""

    def update_block_hashes(self) -> None:
        self.block_hashes.append(hash(self.cache_salt))


def request(ids: list[int], **fields: Any) -> FakeRequest:
    made = FakeRequest(
        request_id=str(next(numbers)), prompt_token_ids=ids, all_token_ids=list(ids), prompt_embeds=None, mm_features=[],
        lora_request=None, resumable=False, skip_reading_prefix_cache=False, cache_salt=None, kv_transfer_params=None,
        sampling_params=SimpleNamespace(prompt_logprobs=None, extra_args=None), num_computed_tokens=0, block_hashes=[],
        status=SimpleNamespace(name="FINISHED_STOPPED"),
    )  # fmt: skip
    made.__dict__.update(fields)
    made.update_block_hashes()
    return made


def desk(ranks: int = 1, **extra: Any) -> Desk:
    made = Desk(
        Settings.from_extra(extra), "model", ranks=ranks, step_tokens=256, max_rows=8, block_size=16, prefix_caching=True
    )
    made.heard(News())
    return made


def text(seed: int, tokens: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(3, 5000, tokens).tolist()
    return ids


def live(it: Desk, made: FakeRequest, ranks: int = 1) -> Step:
    """The life of a request that is computed densely; the workers keep what they are told. The step that saves its prompt."""
    it.arrived(made)
    assert it.promised(made, 0) == 0
    it.allocated(made, [1, 2, 3], 0)
    made.num_computed_tokens = len(made.prompt_token_ids)
    step = it.step({made.request_id: 1}, lambda _: [1, 2, 3])
    it.heard(News(kept=Counter({segment.key: ranks for save in step.saves for segment in save.segments})))
    it.finished(made, [1, 2, 3])
    return step


def alone(it: Desk, ids: list[int], ranks: int = 1, **fields: Any) -> Step:
    """A text that is computed alone; the step that saves it."""
    return live(it, request(ids, kv_transfer_params={"kvcomm": {"prefill": True}}, **fields), ranks)


def reader(known: Sequence[int], seed: int = 2, agent: str = "critic", **words: Any) -> FakeRequest:
    """20 new tokens in front, 30 behind."""
    said = {"kvcomm": {"agent": agent, **words}}
    return request([*text(seed, 20), *known, *text(seed + 100, 30)], kv_transfer_params=said)


def asked(it: Desk, made: FakeRequest) -> Ask:
    """The request comes, and the workers are asked about it."""
    it.arrived(made)
    assert it.promised(made, 0) is None
    (ask,) = it.step({}, lambda _: []).asks
    assert it.promised(made, 0) is None, "the answer is on its way"
    assert it.step({}, lambda _: []).asks == ()
    return ask


def fallback(it: Desk, made: FakeRequest) -> str | None:
    _, report = it.finished(made, [])
    assert report is not None
    return report.fallback


def able(it: Desk, tenant: str = "", agent: str = "critic") -> None:
    it.heard(News(able={(tenant, agent)}))


def test_a_text_alone_is_kept_whole_and_nothing_else_of_it() -> None:
    it, known = desk(), text(1, 100)
    (save,) = alone(it, known).saves
    (segment,) = save.segments
    assert (segment.ids.tolist(), segment.start, segment.alone, segment.exact) == (known, 0, True, True)
    assert (save.lesson, len(it.index)) == (None, 1)
    more = [*known, *text(4, 50)]
    (save,) = alone(it, more).saves
    assert save.segments[0].ids.tolist() == more, "what is known of it is computed all the same"
    assert not alone(it, known).saves
    assert not alone(it, text(5, 10)).saves
    assert it.counters.value("fallbacks", "prefill") == 4


def test_moved_text_waits_is_learned_from_and_then_asked_about() -> None:
    it, known = desk(explore=0.0), text(1, 100)
    alone(it, known)
    (save,) = live(it, reader(known)).saves
    assert save.lesson is not None
    (span,) = save.lesson.spans
    assert (span.start, span.end, span.segment.alone, save.lesson.who.agent) == (20, 120, True, "critic")
    assert [s.ids.tolist() for s in save.segments] == [text(2, 20), text(102, 30)], "known text is not kept once more"
    able(it)
    made = reader(known, seed=3)
    ask = asked(it, made)
    assert (ask.request_id, ask.ids.tolist(), ask.who.agent) == (made.request_id, made.prompt_token_ids, "critic")
    assert [s.rung for s in ask.plan.spans] == ["boundary"]
    again = np.union1d(ask.plan.recompute, [50, 51, 90])
    it.heard(News(answers={made.request_id: Answer(again)}))
    assert it.promised(made, 0) == it.promised(made, 0) == 95
    it.allocated(made, [4, 5], 95)
    (load,) = it.step({made.request_id: 55}, lambda _: []).loads
    assert (load.holes, load.corrections) == (((0, 22), (50, 52), (90, 91), (120, 150)), None)
    _, report = it.finished(made, [])
    assert report is not None
    assert (report.tokens_by_rung["anchor"], report.computed_tokens, report.fallback) == (95, 55, None)
    assert report.estimate_ms is not None


def test_what_is_added_is_told_to_the_workers() -> None:
    it, known = desk(explore=0.0), text(1, 100)
    alone(it, known)
    able(it)
    made = reader(known)
    ask = asked(it, made)
    it.heard(News(answers={made.request_id: Answer(ask.plan.recompute, adds=True)}))
    promised = it.promised(made, 0)
    assert promised
    it.allocated(made, [4, 5], promised)
    (load,) = it.step({made.request_id: 30}, lambda _: []).loads
    assert load.corrections is ask


def test_the_budget_of_holes_counts_what_is_computed_again() -> None:
    """Of what the budget does not reach, nothing is promised."""
    it, known = desk(explore=0.0, max_hole_tokens=30), text(1, 100)
    alone(it, known)
    able(it)
    made = reader(known)
    ask = asked(it, made)
    it.heard(News(answers={made.request_id: Answer(np.union1d(ask.plan.recompute, np.arange(80, 100)))}))
    assert it.promised(made, 0) == 58
    it.allocated(made, [4, 5], 58)
    assert it.step({made.request_id: 92}, lambda _: []).loads[0].holes == ((0, 22), (80, 150))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(None), "learning"),
        (Answer(None, fault="no idea"), "fault: no idea"),
        (Answer(np.arange(140)), "too-much-recomputed"),
    ],
    ids=["too little", "fault", "too much"],
)
def test_answers_that_do_not_help(answer: Answer, reason: str) -> None:
    """The prompt is computed, and can be learned from."""
    it, known = desk(explore=0.0), text(1, 100)
    alone(it, known)
    able(it)
    made = reader(known)
    asked(it, made)
    it.heard(News(answers={made.request_id: answer}))
    assert [it.promised(made, 0) for _ in range(3)] == [0, 0, 0]
    it.allocated(made, [4, 5], 0)
    made.num_computed_tokens = 150
    (save,) = it.step({made.request_id: 1}, lambda _: [4, 5]).saves
    assert save.lesson is not None
    assert fallback(it, made) == reason
    later = reader(known, seed=5)
    it.arrived(later)
    waits = it.promised(later, 0)
    assert waits == (0 if answer.recompute is None and answer.fault is None else None)
    able(it)
    other = reader(known, seed=6)
    it.arrived(other)
    assert it.promised(other, 0) is None


def test_no_answer_is_a_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    it, known = desk(explore=0.0), text(1, 100)
    alone(it, known)
    able(it)
    made = reader(known)
    asked(it, made)
    monkeypatch.setattr(asking, "PATIENCE", -1.0)
    assert it.promised(made, 0) == 0
    it.heard(News(answers={made.request_id: Answer(np.arange(30))}))
    assert it.promised(made, 0) == 0
    assert str(fallback(it, made)).startswith("fault: CacheFault('the workers did not say")
    assert it.counters.value("faults", "plan") == 1


def test_what_left_while_the_answer_came_is_not_promised() -> None:
    it, known = desk(explore=0.0), text(1, 100)
    (save,) = alone(it, known).saves
    able(it)
    made = reader(known)
    ask = asked(it, made)
    it.heard(News(answers={made.request_id: Answer(ask.plan.recompute)}, gone={save.segments[0].key}))
    assert it.promised(made, 0) == 0
    assert fallback(it, made) == "nothing-known"


def test_one_request_in_some_is_learned_from() -> None:
    """Decided once for each, however often the engine asks."""
    it, known = desk(explore=0.5), text(1, 100)
    alone(it, known)
    able(it)
    for seed, promised in ((2, None), (3, 0), (4, None), (5, 0)):
        made = reader(known, seed)
        it.arrived(made)
        assert [it.promised(made, 0) for _ in range(3)] == [promised] * 3
        assert fallback(it, made) == ("not-loaded" if promised is None else "learning")


def test_what_does_not_wait_is_not_asked_about() -> None:
    """Text of other prompts, where nobody prefills texts alone; exact rule and shadow; anchors that are off."""
    it, known = desk(), text(1, 100)
    live(it, request(known))
    made = reader(known)
    it.arrived(made)
    assert it.promised(made, 0) == 98
    for off in (desk(anchors="off"), desk(ranks=2)):
        alone(off, known, off._ranks)
        later = reader(known)
        off.arrived(later)
        assert off.promised(later, 0) == 98
        assert not off.step({}, lambda _: []).asks
    waits = desk(explore=0.0)
    alone(waits, known)
    able(waits)
    for word, value, reason in (("rule", "exact", "nothing-exact"), ("mode", "shadow", "shadow")):
        later = reader(known, **{word: value})  # type: ignore[arg-type]  # no other argument is called so
        (save,) = live(waits, later).saves
        assert save.lesson is not None
        assert waits.counters.value("fallbacks", reason) == 1


def test_all_moved_text_waits_where_asked_for() -> None:
    it, known = desk(anchors="all", explore=0.0), text(1, 100)
    live(it, request(known))
    (save,) = live(it, reader(known)).saves
    assert save.lesson is not None
    able(it)
    asked(it, reader(known, seed=3))


def test_tenants_and_agents() -> None:
    """What one agent taught serves all of its tenant; nothing crosses tenants."""
    it, known = desk(explore=0.0), text(1, 100)
    for tenant in ("one", "two"):
        alone(it, known, cache_salt=tenant)
    able(it, "one", "clerk")
    for tenant, promised in (("one", None), ("two", 0)):
        made = reader(known)
        made.cache_salt = tenant
        it.arrived(made)
        assert it.promised(made, 0) == promised


def test_reset() -> None:
    it, known = desk(explore=0.0), text(1, 100)
    alone(it, known)
    able(it)
    made = reader(known)
    ask = asked(it, made)
    it.reset()
    it.heard(News(answers={made.request_id: Answer(ask.plan.recompute)}))
    assert it.promised(made, 0) == 0
    assert fallback(it, made) == "nothing-known"
    it.step({}, lambda _: [])
    live(it, request(known))
    later = reader(known, seed=4)
    it.arrived(later)
    assert it.promised(later, 0) == 98


@pytest.mark.parametrize("said", [2, "yes", [], None])
def test_unusable_words(said: Any) -> None:
    it = desk()
    made = request(text(1, 40), kv_transfer_params={"kvcomm": {"prefill": said}})
    it.arrived(made)
    assert it.promised(made, 0) == 0
    assert str(fallback(it, made)).startswith("unusable-wish: prefill is")


def test_said_by_extra_arguments() -> None:
    it = desk()
    made = request(text(1, 40))
    made.sampling_params.extra_args = {"kvcomm_prefill": 1}
    live(it, made)
    assert it.counters.value("fallbacks", "prefill") == 1
