"""Texts prefilled alone, and what anchors do for them: against plain transformers, and against the tasks' right answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvcomm.anchors import snapshot
from kvcomm.anchors.pool import AnchorPool
from kvcomm.bench.drift import Question, questions
from kvcomm.call import Call
from kvcomm.codecs import codec, unpack
from kvcomm.config import Config
from kvcomm.engine import KVComm, Output
from kvcomm.errors import InputError
from kvcomm.estimators import Estimate, Place
from kvcomm.segments import Plan, SegmentKV, Span
from kvcomm.store.slabs import SlabStore
from kvcomm.store.tiered import Tiered
from kvcomm.testing import tiny_random
from kvcomm.tiny import tasks
from kvcomm.tiny import tokenizer as tiny_tokenizer

CONTENT = " city is oslo . pet is dog . the old river waits slowly . food is rice . the young sailor sings loudly ."
OWNERS = ("bob", "erin", "jack", "alice", "mary", "carl", "dora", "fred")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer.build()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_random("llama", vocab_size=768, max_position_embeddings=600, initializer_range=0.3)


@pytest.fixture
def comm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> KVComm:
    return made(model, tokenizer)


def made(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **config: Any) -> KVComm:
    given = {"anchor_codec": "raw", "explore": 0.0, **config}
    return KVComm.from_model(model, tokenizer, config=Config(**given))


def messages(owner: str) -> list[dict[str, str]]:
    """A prompt that names the content's owner in front of it."""
    role = f"you are the clerk of {owner} , a careful agent of the team ."
    return [
        {"role": "system", "content": role},
        {"role": "user", "content": f"report about {owner} :{CONTENT} city of {owner} ?"},
    ]


def ask(comm: KVComm, owner: str, **options: Any) -> Output:
    return comm.generate(messages(owner), max_new_tokens=8, do_sample=False, **options)


def plain(comm: KVComm, owner: str) -> list[int]:
    """Reference: transformers alone."""
    ids = torch.tensor([comm.encode(messages(owner))])
    model: Any = comm.backend.model
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return [int(token) for token in out[0, ids.shape[1] :]]


def dense_kv(comm: KVComm, ids: list[int]) -> SegmentKV:
    """Reference: what transformers caches of a prompt."""
    with torch.no_grad():
        cache: Any = comm.backend.model(torch.tensor([ids]), use_cache=True).past_key_values
    keys, values = zip(*((layer.keys[0], layer.values[0]) for layer in cache.layers), strict=True)
    return SegmentKV(keys, values, 0, len(ids))


class Known:
    """In place of what was learned: deviations that are given, or None."""

    def __init__(self, estimate: Any) -> None:
        self.estimate = estimate


# --- prefill -----------------------------------------------------------------------------------------------------------------


def test_prefill_keeps_what_transformers_computes(comm: KVComm) -> None:
    ids = [comm.backend.tokenizer.bos_token_id, *comm.backend.tokenizer.encode(CONTENT, add_special_tokens=False)]  # type: ignore[union-attr]
    assert comm.prefill(CONTENT) == len(ids) - 1
    assert comm.prefill(CONTENT) == 0
    (key,) = comm.index._records
    kept, expected = comm.store.get(key), dense_kv(comm, ids)
    assert kept is not None
    for a, b in zip((*kept.keys, *kept.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(a, b[:, 1:])


def test_prefilled_text_that_left_the_front_tier_is_loaded_not_computed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    front = SlabStore(1 << 20)
    comm = KVComm.from_model(model, tokenizer, store=Tiered(front, SlabStore(1 << 20)))
    assert comm.prefill(CONTENT) > 0
    (key,) = comm.index._records
    front.remove(key)
    assert comm.prefill(CONTENT) == 0
    assert key in front


def test_a_prompt_that_begins_with_prefilled_text_reuses_it_exactly(comm: KVComm) -> None:
    comm.prefill(CONTENT)
    bos = comm.backend.tokenizer.decode([comm.backend.tokenizer.bos_token_id])  # type: ignore[union-attr]
    report = comm.generate(f"{bos}{CONTENT} city of bob ?", max_new_tokens=2, do_sample=False).report
    assert [s.rung for s in report.spans] == ["exact"]


@pytest.mark.parametrize("text", ["", " city" * 700])
def test_unusable_text(comm: KVComm, text: str) -> None:
    with pytest.raises(InputError, match=r"no tokens|context 600"):
        comm.prefill(text)


def test_prefill_of_a_short_text_or_into_a_full_store_keeps_nothing(
    comm: KVComm, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert comm.prefill(" city is oslo .") == 0
    assert made(model, tokenizer, store_bytes=10).prefill(CONTENT) == 0


def test_prefill_does_not_cross_tenants(comm: KVComm) -> None:
    comm.prefill(CONTENT, tenant="a")
    assert ask(comm, "bob", tenant="b").report.fallback == "nothing-known"
    assert ask(comm, "bob", tenant="a").report.fallback == "learning"


# --- learning ----------------------------------------------------------------------------------------------------------------


def test_a_text_computed_alone_waits_for_anchors(comm: KVComm) -> None:
    """Dense until anchors are known, then on rung anchor."""
    comm.prefill(CONTENT)
    first = ask(comm, "bob", agent="clerk")
    assert first.report.fallback == "learning"
    assert first.token_ids == plain(comm, "bob")
    (anchor,) = comm.anchors.match("clerk", comm.backend.fingerprint)
    assert anchor.ids.tolist() == comm.backend.tokenizer.encode(CONTENT, add_special_tokens=False)  # type: ignore[union-attr]
    comm._corrector._pupils = Known(lambda tenant, place: Estimate(None, torch.ones(len(place.ids))))  # type: ignore[assignment]
    second = ask(comm, "erin", agent="clerk")
    assert {s.rung for s in second.report.spans} >= {"anchor"}
    assert second.report.tokens_by_rung["anchor"] > 0


def test_an_anchor_is_the_difference_to_the_dense_kv(comm: KVComm) -> None:
    """Base and deviation, moved to where the text stood, against the cache of a plain forward."""
    comm.prefill(CONTENT)
    ask(comm, "bob", agent="clerk")
    (anchor,) = comm.anchors.match("clerk", comm.backend.fingerprint)
    start, ids = len(anchor.consumer_context), comm.encode(messages("bob"))
    expected = comm.backend.plain(dense_kv(comm, ids), start, start + anchor.tokens)
    base, deviation = (unpack(codec("raw"), kv) for kv in (anchor.base, anchor.deviation))
    for kind in ("keys", "values"):
        parts = (getattr(kv, kind) for kv in (expected, base, deviation))
        for truth, b, d in zip(*parts, strict=True):
            torch.testing.assert_close(b + d, truth, atol=1e-4, rtol=1e-4)


def test_the_true_deviation_gives_the_dense_answer(comm: KVComm) -> None:
    """With what a plain forward shows added, nothing but the closing text computed again, answers are dense ones."""
    comm.prefill(CONTENT)

    def truth(tenant: str, place: Place) -> Estimate:
        ids = comm.encode(messages("erin"))
        start = next(i for i in range(len(ids)) if ids[i : i + len(place.ids)] == place.ids.tolist())
        real = comm.backend.plain(dense_kv(comm, ids), start, start + len(place.ids))
        return Estimate(real.minus(place.base), torch.zeros(len(place.ids)))

    comm._corrector._pupils = Known(truth)  # type: ignore[assignment]
    got = ask(comm, "erin")
    assert got.report.tokens_by_rung["anchor"] > 10
    assert got.token_ids == plain(comm, "erin")
    comm._corrector._pupils = Known(lambda tenant, place: Estimate(None, torch.zeros(len(place.ids))))  # type: ignore[assignment]
    assert ask(comm, "fred").token_ids != plain(comm, "fred"), "without it they are not, so this test can fail"


def test_all_computed_again_is_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    comm = made(model, tokenizer, doubt=0.0)
    comm.prefill(CONTENT)
    comm._corrector._pupils = Known(lambda tenant, place: Estimate(None, torch.ones(len(place.ids))))  # type: ignore[assignment]
    for owner in OWNERS:
        assert ask(comm, owner).token_ids == plain(comm, owner)


def test_the_doubted_tokens_are_computed_again(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    comm = made(model, tokenizer, doubt=2.0, boundary=0, closing=1)
    comm.prefill(CONTENT)
    doubted = (3, 7, 11)

    def doubt(tenant: str, place: Place) -> Estimate:
        marks = torch.zeros(len(place.ids))
        marks[:] = 0.3
        marks[list(doubted)] = torch.tensor([1.0, 3.0, 2.0])
        return Estimate(None, marks)

    comm._corrector._pupils = Known(doubt)  # type: ignore[assignment]
    seen: list[Any] = []
    arm = comm.backend.arm
    comm.backend.arm = lambda cache, ids, recompute: (seen.append(recompute), arm(cache, ids, recompute))  # type: ignore[assignment, func-returns-value]
    span = ask(comm, "bob").report.spans[-1]
    again = [int(i) - span.start for i in seen[0] if span.start <= i < span.end]
    assert again == list(doubted)


def test_one_request_in_some_is_learned_from(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    comm = made(model, tokenizer, explore=0.25)
    comm.prefill(CONTENT)
    comm._corrector._pupils = Known(lambda tenant, place: Estimate(None, torch.ones(len(place.ids))))  # type: ignore[assignment]
    assert [ask(comm, owner).report.fallback for owner in OWNERS[:4]] == [None, None, None, "learning"]


def test_an_agent_that_shares_nothing_moved_teaches_too(comm: KVComm) -> None:
    comm.prefill(CONTENT)
    ask(comm, "bob", agent="judge", rule="exact")
    assert len(comm.anchors.match("judge", comm.backend.fingerprint)) == 1


def test_all_moved_text_waits_where_asked_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Text that another agent's prompt left behind is reused at once by default, and learned from first under `all`."""
    for anchors, expected in (("alone", None), ("all", "learning")):
        comm = made(model, tokenizer, anchors=anchors)
        ask(comm, "bob")
        assert ask(comm, "erin").report.fallback == expected
        assert len(comm.anchors) == (anchors == "all")


def test_text_of_other_prompts_waits_too_where_texts_are_computed_alone(comm: KVComm) -> None:
    """What one prompt left behind knows another owner: it is no base to be used without anchors."""
    ask(comm, "dora")
    comm.prefill(" the old market waits slowly . the young river moves again . the small train sings loudly .")
    assert [ask(comm, owner).report.fallback for owner in OWNERS[:3]] == ["learning"] * 3


def test_a_short_exact_prefix_is_no_fallback(comm: KVComm) -> None:
    """Nothing moved, so anchors have no say, however much of the prompt is new."""
    ask(comm, "bob")
    role = messages("bob")[0]
    new = {"role": "user", "content": " ".join(f"the old river waits {word} ." for word in OWNERS * 3)}
    report = comm.generate([role, new], max_new_tokens=2, do_sample=False).report
    assert [span.rung for span in report.spans] == ["exact"]
    assert report.computed_tokens > 0.8 * report.prompt_tokens
    assert report.fallback is None


def test_anchors_off(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    comm = made(model, tokenizer, anchors="off")
    comm.prefill(CONTENT)
    assert [s.rung for s in ask(comm, "bob").report.spans] == ["boundary"]
    assert not len(comm.anchors)


@pytest.mark.parametrize(
    "wrong",
    [
        {"anchors": "some"},
        {"doubt": -1.0},
        {"explore": -0.1},
        {"anchors_per_slot": 0},
        {"estimator": "best"},
        {"anchor_codec": "x"},
    ],
)
def test_unusable_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wrong: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=next(iter(wrong.values())) if isinstance(next(iter(wrong.values())), str) else "must|share"
    ):
        made(model, tokenizer, **wrong)


# --- the draft check, as a rule ----------------------------------------------------------------------------------------------


def test_a_doubted_draft_is_a_dense_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Not a fault, and nothing is forgotten: the text is there for the next request. What was computed is learned from."""
    comm = made(model, tokenizer, draft_check=1e-9)
    comm.prefill(CONTENT)
    comm._corrector._pupils = Known(lambda tenant, place: Estimate(None, torch.zeros(len(place.ids))))  # type: ignore[assignment]
    for owner in OWNERS[:2]:
        out = ask(comm, owner)
        assert out.report.fallback is not None
        assert out.report.fallback.startswith("draft-check: ")
        assert out.report.reused_tokens == 0
        assert out.token_ids == plain(comm, owner)
    assert comm.counters.total("faults") == 0
    assert len(comm.anchors) == 2


def test_a_draft_that_holds_is_served(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The same answer as without the check, a few more tokens computed; an exact prefix is not checked."""
    answers = {}
    for nats in (0.0, 1e9):
        comm = made(model, tokenizer, draft_check=nats, doubt=0.0)
        comm.prefill(CONTENT)
        comm._corrector._pupils = Known(lambda tenant, place: Estimate(None, torch.zeros(len(place.ids))))  # type: ignore[assignment]
        answers[nats] = ask(comm, "bob")
        assert not answers[nats].report.fallback
    assert answers[1e9].report.computed_tokens == answers[0.0].report.computed_tokens + 8
    again = ask(comm, "bob").report
    assert {span.rung for span in again.spans} >= {"exact"}


def test_where_answers_end() -> None:
    """By the call, by its generation config, by the model's; one id, several or none."""
    model = tiny_random("llama", vocab_size=768)
    model.generation_config.eos_token_id = 7

    def stop(**options: Any) -> list[int]:
        return Call(cast("Any", model).generate, (), options).stop_ids(model)

    assert stop() == [7]
    assert stop(eos_token_id=[1, 2]) == [1, 2]
    assert stop(generation_config=GenerationConfig(eos_token_id=3)) == [3]
    assert stop(generation_config=GenerationConfig()) == []


# --- faults ------------------------------------------------------------------------------------------------------------------


def test_a_failing_estimator_is_a_dense_answer(comm: KVComm) -> None:
    comm.prefill(CONTENT)

    def fail(tenant: str, place: Place) -> Estimate:
        raise RuntimeError("no idea")

    comm._corrector._pupils = Known(fail)  # type: ignore[assignment]
    out = ask(comm, "bob")
    assert out.token_ids == plain(comm, "bob")
    assert out.report.fallback == "fault: no idea"
    assert comm.counters.value("faults", "plan") == 1


def test_a_deviation_of_nan_is_a_dense_answer(comm: KVComm) -> None:
    comm.prefill(CONTENT)

    def nan(tenant: str, place: Place) -> Estimate:
        return Estimate(place.base.map(lambda x: x * float("nan")), torch.zeros(len(place.ids)))

    comm._corrector._pupils = Known(nan)  # type: ignore[assignment]
    out = ask(comm, "bob")
    assert out.token_ids == plain(comm, "bob")
    assert comm.counters.total("faults") == 1


def test_nan_in_prefilled_kv_teaches_nothing(comm: KVComm) -> None:
    comm.prefill(CONTENT)
    (key,) = comm.index._records
    kept = comm.store.get(key)
    assert kept is not None
    kept.values[1][:] = float("nan")
    out = ask(comm, "bob")
    assert out.token_ids == plain(comm, "bob")
    assert not len(comm.anchors)


def test_a_lesson_that_fails_costs_nothing_else(comm: KVComm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is there, and what is new in the prompt is kept all the same."""
    comm.prefill(CONTENT)
    monkeypatch.setattr(comm._corrector, "_base", lambda span: 1 / 0)
    known = len(comm.index)
    assert ask(comm, "bob").token_ids == plain(comm, "bob")
    assert comm.counters.value("faults", "anchor") == 1
    assert len(comm.index) > known


# --- the embedded model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return list(questions(34, 4, 6, random.Random(5)))


def right(comm: KVComm, asked: list[Question]) -> Iterator[tuple[bool, Output]]:
    for question in asked:
        for content in question.contents:
            comm.prefill(content)
        out = comm.generate(question.messages, agent=question.agent, max_new_tokens=32, do_sample=False)
        yield tasks.score([question.item], out.text) == [True], out


def test_answers_stay_right_where_boundaries_alone_lose_them(asked: list[Question], tmp_path: Any) -> None:
    """The tasks' own answers. What was learned survives a restart."""
    shared = KVComm.from_pretrained(dtype="float32")
    served = list(right(shared, asked))
    reused = [out.report.reuse_rate for _, out in served[10:]]
    assert sum(r for r, _ in served) >= 33
    assert sum(reused) / len(reused) > 0.8
    assert any(out.report.tokens_by_rung["anchor"] for _, out in served)
    without = KVComm(shared.backend, config=Config(anchors="off"))
    assert sum(r for r, _ in right(without, asked)) < 26
    snapshot.save(shared.anchors, tmp_path)
    again = KVComm(shared.backend)
    snapshot.load(again.anchors, tmp_path, shared.backend.fingerprint)
    first = list(right(again, asked[:8]))
    assert all(r for r, _ in first)
    assert all(out.report.fallback != "learning" for _, out in first)


def test_a_pool_may_be_shared(asked: list[Question]) -> None:
    """A second engine serves at once with what the first one learned, in a pool that was empty when both were made."""
    pool = AnchorPool(1 << 24)
    one = KVComm.from_pretrained(dtype="float32", anchors=pool)
    two = KVComm(one.backend, anchors=pool)
    list(right(one, list(questions(12, 4, 1, random.Random(6)))))
    assert len(pool) >= 20
    assert all(out.report.fallback != "learning" for _, out in right(two, asked[:6]))


def test_lessons_are_what_is_known_and_not_served(comm: KVComm) -> None:
    comm.prefill(CONTENT)
    (record,) = comm.index._records.values()
    segment = replace(record.segment, alone=True)
    known = [Span(100 * i, 100 * i + 20 + i, "boundary", segment, 0) for i in range(12)]
    assert comm._corrector.waiting.lessons(Plan.dense(1300, "learning"), known, "", comm.store) == known
