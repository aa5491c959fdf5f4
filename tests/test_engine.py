"""The engine on small random models, against plain transformers: the same answers, and dense ones whatever goes wrong."""

from __future__ import annotations

import threading
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from kvcomm.config import Config
from kvcomm.engine import KVComm, Output
from kvcomm.errors import InputError
from kvcomm.segments import Plan, Segment, SegmentKV
from kvcomm.store.memory import MemoryStore
from kvcomm.store.null import NullStore
from kvcomm.store.slabs import SlabStore
from kvcomm.store.tiered import Tiered
from kvcomm.testing import tiny_random
from kvcomm.tiny import tokenizer as tiny_tokenizer

TEXT = (
    "report about bob : city is oslo . pet is dog . the old river waits slowly . "
    "report about erin : city is rome . food is rice ."
)
QUESTION = "questions : city of bob ? food of erin ? now write the final answer in the style of your role only ."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer.build()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_random("llama", vocab_size=768, max_position_embeddings=600, initializer_range=0.3)


@pytest.fixture
def comm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> KVComm:
    return KVComm.from_model(model, tokenizer, config=Config())


def messages(role: str, text: str = TEXT) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": f"you are the {role} , a careful agent of the team ."},
        {"role": "user", "content": f"{text} {QUESTION}"},
    ]


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    """The model's own generate, which transformers leaves loosely typed, or what has taken its place."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def plain(model: PreTrainedModel, ids: list[int], n: int = 12, **options: Any) -> list[int]:
    """Reference: transformers alone."""
    out = generate(model, torch.tensor([ids]), max_new_tokens=n, do_sample=False, **options)
    return [int(token) for token in out[0, len(ids) :]]


def answer(comm: KVComm, prompt: Any, **options: Any) -> Output:
    return comm.generate(prompt, max_new_tokens=12, do_sample=False, **options)


def test_nothing_known_is_plain_generate(comm: KVComm, model: PreTrainedModel) -> None:
    """First request against transformers alone."""
    out = answer(comm, messages("clerk"), agent="clerk")
    assert out.token_ids == plain(model, comm.encode(messages("clerk")))
    assert out.report.fallback
    assert out.report.reused_tokens == 0
    assert out.report.agent == "clerk"
    assert out.ttft_ms > 0
    assert out.report.learn_ms is not None


def test_same_prompt_again_is_exact(comm: KVComm, model: PreTrainedModel) -> None:
    first, second = answer(comm, messages("clerk")), answer(comm, messages("clerk"))
    assert second.token_ids == first.token_ids == plain(model, comm.encode(messages("clerk")))
    assert [s.rung for s in second.report.spans] == ["exact"]
    assert second.report.computed_tokens == 1


def test_another_agent_reuses_the_moved_text(comm: KVComm) -> None:
    answer(comm, messages("clerk"), agent="clerk")
    report = answer(comm, messages("very old and very quiet analyst"), agent="analyst").report
    assert report.fallback is None
    moved = [s for s in report.spans if s.rung == "boundary"]
    assert moved
    assert all(s.producer == "clerk" and s.moved_tokens > 0 for s in moved)
    assert report.reused_tokens + report.computed_tokens == report.prompt_tokens
    assert sum(report.tokens_by_rung.values()) == report.prompt_tokens
    assert report.reuse_rate > 0.5


def test_all_recomputed_equals_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Spans found and moved, then every token of them recomputed: the text of transformers alone."""
    comm = KVComm.from_model(model, tokenizer, config=Config(closing=10_000, max_recompute=1.0))
    answer(comm, messages("clerk"))
    out = answer(comm, messages("very old analyst"))
    assert out.token_ids == plain(model, comm.encode(messages("very old analyst")))


def test_rotation_matters(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Negative control: the arms that exist to be compared with do give other logits."""
    outs = {}
    for rung in ("naive", "rotate", "boundary"):
        comm = KVComm.from_model(model, tokenizer, config=Config(rung=rung))
        answer(comm, messages("clerk"))
        with comm.attach():
            ids = torch.tensor([comm.encode(messages("very old and very quiet analyst"))])
            got = generate(model, ids, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        outs[rung] = got.logits[0]
    assert not torch.allclose(outs["naive"], outs["rotate"], atol=1e-3)
    assert not torch.allclose(outs["rotate"], outs["boundary"], atol=1e-3)


WORDS = " city of bob is oslo and pet of erin is dog . food of bob is rice . color of ute is red ."


def teach(comm: KVComm, generated: list[int]) -> tuple[list[int], Segment, SegmentKV]:
    """As if the model had said `generated` to the clerk's prompt: the prompt's ids, and what is stored of the answer."""
    prompt = comm.encode(messages("clerk"))
    cache = comm.backend.cache(600)
    with torch.no_grad():  # the last sampled token is never fed back
        comm.backend.model(torch.tensor([[*prompt, *generated[:-1]]]), past_key_values=cache)
    plan = Plan(len(prompt), (), np.arange(len(prompt)), "nothing-known")
    ids = np.asarray(prompt, dtype=np.int32)
    comm._learner.learn_prompt(ids, plan, cache, "clerk", "")
    comm._learner.learn_answer(ids, plan, cache, torch.tensor([[*prompt, *generated]]), "clerk", "")
    [segment] = [s for s in comm.store.segments() if s.start == len(prompt)]
    kv = comm.store.get(segment.key)
    assert kv is not None
    return prompt, segment, kv


def dense_kv(model: PreTrainedModel, prompt: list[int], answer_ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Reference: one forward of transformers over prompt and answer; per layer the answer's K and V."""
    with torch.no_grad():
        cache = model(torch.tensor([[*prompt, *answer_ids]])).past_key_values
    return [(layer.keys[0, :, len(prompt) :], layer.values[0, :, len(prompt) :]) for layer in cache.layers]


def test_an_answer_is_known_to_its_readers(comm: KVComm, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sampled as it will be read: all of it is stored, the last token too, with the KV of a dense forward."""
    words = tokenizer.encode(WORDS, add_special_tokens=False)
    prompt, segment, kv = teach(comm, words)
    assert segment.ids.tolist() == words
    for keys, values, (k, v) in zip(kv.keys, kv.values, dense_kv(model, prompt, words), strict=True):
        torch.testing.assert_close(keys, k, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(values, v, atol=1e-4, rtol=1e-3)


def test_an_answer_whose_ids_change_when_read(comm: KVComm, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """One word sampled as bytes: the segment has the readers' ids and is not called exact; layer 0, which sees no context, has
    the KV of a dense forward over them, also where tokens moved.
    """
    words = tokenizer.encode(WORDS, add_special_tokens=False)
    generated = [*words[:2], *(tokenizer.convert_tokens_to_ids(c) for c in "Ġbob"), *words[3:]]
    assert tokenizer.decode(generated) == WORDS
    prompt, segment, kv = teach(comm, generated)
    assert segment.ids.tolist() == words
    assert not segment.exact
    k, v = dense_kv(model, prompt, words)[0]
    torch.testing.assert_close(kv.keys[0], k, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(kv.values[0], v, atol=1e-5, rtol=1e-3)


def test_answers_flow_between_agents(comm: KVComm, tokenizer: PreTrainedTokenizerBase) -> None:
    teach(comm, tokenizer.encode(WORDS, add_special_tokens=False))
    report = answer(comm, messages("analyst", f"the quiet river moves . clerk says :{WORDS} so"), agent="analyst").report
    assert any(s.producer == "clerk" and s.reused_tokens > 10 for s in report.spans)


@pytest.mark.parametrize("prompt", ["", []])
def test_empty_prompt(comm: KVComm, prompt: Any) -> None:
    with pytest.raises(InputError, match="empty"):
        comm.generate(prompt)


def test_prompt_over_the_context(comm: KVComm) -> None:
    for ask in (comm.generate, comm.stream):
        with pytest.raises(InputError, match=r"700 tokens.*600"):
            ask(" bob" * 700)


def test_a_rope_that_reaches_beyond_its_training_length(tokenizer: PreTrainedTokenizerBase) -> None:
    """A dynamic rope made for 40 tokens; the prompt has over 60."""
    model = tiny_random("llama-dynamic", vocab_size=768)
    comm = KVComm.from_model(model, tokenizer, config=Config())
    expected = plain(model, comm.encode(messages("clerk")))
    out = answer(comm, messages("clerk"))
    assert out.token_ids == expected
    assert out.report.prompt_tokens > 60


def test_records_instead_of_tensors(comm: KVComm, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for with the call, or by the checkpoint: generate then returns a record, whose sequences are the answer."""
    expected = plain(model, comm.encode(messages("clerk")))
    assert answer(comm, messages("clerk"), return_dict_in_generate=True).token_ids == expected
    monkeypatch.setattr(model.generation_config, "return_dict_in_generate", True)
    assert answer(comm, messages("clerk")).token_ids == expected


def test_unusable_options(comm: KVComm) -> None:
    for ask in (comm.generate, comm.stream):
        with pytest.raises(InputError, match="max_new_tokens is 0"):
            ask("bob", max_new_tokens=0)
        with pytest.raises(InputError, match="rule is 'sometimes'"):
            ask("bob", rule="sometimes")  # type: ignore[arg-type]  # that is the point


def test_one_token(comm: KVComm, model: PreTrainedModel) -> None:
    for _ in range(2):
        assert answer(comm, " bob").token_ids == plain(model, comm.encode(" bob"))


def test_one_token_of_overlap_is_no_span(comm: KVComm) -> None:
    answer(comm, " bob")
    assert answer(comm, " city of bob").report.spans == ()


def test_exact_rule_never_approximates(comm: KVComm, model: PreTrainedModel) -> None:
    answer(comm, messages("clerk"))
    out = answer(comm, messages("analyst"), rule="exact")
    assert all(s.rung == "exact" for s in out.report.spans)
    assert out.token_ids == plain(model, comm.encode(messages("analyst")))


def test_tenants_share_nothing(comm: KVComm) -> None:
    answer(comm, messages("clerk"), tenant="a")
    assert answer(comm, messages("clerk"), tenant="b").report.reused_tokens == 0
    assert answer(comm, messages("clerk"), tenant="a").report.reused_tokens > 0


def test_nothing_approximate_becomes_exact(comm: KVComm) -> None:
    """A prompt answered with reused text leaves segments that are not taken for exact ones."""
    answer(comm, messages("clerk"))
    answer(
        comm,
        messages(
            "very old analyst", f"{TEXT} the bright letter falls early . the dark train rests today . pet of ute is frog ."
        ),
    )
    late = [s for s in comm.store.segments() if s.start > 30]
    assert late
    assert not any(s.exact for s in late)


def poison(comm: KVComm) -> None:
    """NaN into every stored value, behind the store's back."""
    for segment in comm.store.segments():
        kv = comm.store.get(segment.key)
        assert kv is not None
        for value in kv.values:
            value.data.fill_(float("nan"))  # .data: the write is not counted


def test_nan_in_stored_kv(comm: KVComm, model: PreTrainedModel) -> None:
    answer(comm, messages("clerk"))
    poison(comm)
    out = answer(comm, messages("analyst"))
    assert out.token_ids == plain(model, comm.encode(messages("analyst")))
    assert out.report.fallback
    assert "NaN" in out.report.fallback
    assert comm.counters.value("faults", "poisoned") == 1
    assert answer(comm, messages("analyst")).report.reused_tokens > 0, "what was poisoned is gone, what is new is used"


class Broken(MemoryStore):
    """Loses or refuses what it is asked for."""

    lose = False

    def get(self, key: str) -> SegmentKV | None:
        return None if self.lose else super().get(key)


def test_kv_that_left_between_plan_and_use(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    store = Broken(1 << 30)
    comm = KVComm.from_model(model, tokenizer, config=Config(), store=store)
    answer(comm, messages("clerk"))
    store.lose = True
    out = answer(comm, messages("analyst"))
    assert out.token_ids == plain(model, comm.encode(messages("analyst")))
    assert comm.counters.value("faults", "assemble") == 1


def test_a_fault_of_this_engine_costs_others_nothing(
    comm: KVComm, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, for example: the KV is as good as before, and may be shared."""
    answer(comm, messages("clerk"))
    kept = {s.key for s in comm.store.segments()}

    def explode(*args: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(comm.backend, "fill", explode)
        out = answer(comm, messages("analyst"))
    assert out.token_ids == plain(model, comm.encode(messages("analyst")))
    assert comm.counters.value("faults", "assemble") == 1
    assert kept <= {s.key for s in comm.store.segments()}
    assert answer(comm, messages("critic")).report.reused_tokens > 0


def test_what_left_the_front_tier_is_loaded_when_it_is_found(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    front, back = SlabStore(1 << 24), SlabStore(1 << 24)
    comm = KVComm.from_model(model, tokenizer, config=Config(), store=Tiered(front, back))
    answer(comm, messages("clerk"))
    kept = back.segments()
    for segment in kept:
        assert front.remove(segment.key)
    assert answer(comm, messages("analyst")).report.reused_tokens > 0
    assert {s.key for s in kept} <= {s.key for s in back.segments()}


def test_what_takes_longer_to_load_than_to_compute_is_computed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a slow tier: the report says so, and what was computed instead is at hand afterwards."""
    front, back = SlabStore(1 << 24), SlabStore(1 << 24)
    comm = KVComm.from_model(model, tokenizer, config=Config(), store=Tiered(front, back))
    answer(comm, messages("clerk"))
    real = back.get_records

    def slowly(keys: Any) -> Any:
        sleep(0.5)
        return real(keys)

    monkeypatch.setattr(back, "get_records", slowly)
    for role, reused in (("first", True), ("second", True), ("third", False)):  # two to measure it
        for segment in front.segments():
            front.remove(segment.key)
        out = answer(comm, messages(role))
        assert (out.report.reused_tokens > 0) == reused
        assert ("memory-slower-than-computing" in out.report.declined) != reused
    assert out.token_ids == plain(model, comm.encode(messages("third")))
    assert answer(comm, messages("fourth")).report.reused_tokens > 0


def test_fault_in_learning(comm: KVComm, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*args: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(comm._learner, "learn_prompt", explode)
    assert answer(comm, messages("clerk")).token_ids == plain(model, comm.encode(messages("clerk")))
    assert comm.counters.value("faults", "learn") == 1


def test_fault_in_planning(comm: KVComm, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm.index, "find", lambda *a, **k: 1 / 0)
    out = answer(comm, messages("clerk"))
    assert out.token_ids == plain(model, comm.encode(messages("clerk")))
    assert comm.counters.value("faults", "plan") == 1
    assert out.report.fallback


@pytest.mark.parametrize("limit", [0, 40_000])
def test_store_full(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    comm = KVComm.from_model(model, tokenizer, config=Config(store_bytes=limit))
    for role in ("clerk", "analyst", "old analyst"):
        answer(comm, messages(role))
        assert comm.store.nbytes <= limit
        comm.index.check_integrity()
    if not limit:
        assert answer(comm, messages("clerk")).report.reused_tokens == 0


def test_evicted_text_is_found_no_more(comm: KVComm) -> None:
    answer(comm, messages("clerk"))
    for segment in comm.store.segments():
        comm.store.remove(segment.key)
    assert answer(comm, messages("analyst")).report.reused_tokens == 0
    assert "kvcomm_faults_total{" not in comm.counters.render()


def test_what_the_store_evicts_is_forgotten(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompts of three tenants, of which the store has room for one."""
    comm = KVComm.from_model(model, tokenizer, config=Config(store_bytes=120_000))
    for tenant in "abc":
        answer(comm, messages("clerk"), tenant=tenant)
    assert comm.store.stats().evicted > 0
    assert all(s.key in comm.index for s in comm.store.segments())
    assert len(comm.index) == len(comm.store.segments())
    comm.index.check_integrity()


def test_two_engines_on_one_store(comm: KVComm, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """What the other one has put there, and this one computes too, is known here from then on."""
    other = KVComm.from_model(model, tokenizer, config=Config(), store=comm.store)
    answer(comm, messages("clerk"))
    kept = comm.store.stats().objects
    assert answer(other, messages("clerk")).report.reused_tokens == 0
    assert comm.store.stats().objects == kept
    assert answer(other, messages("clerk")).report.reused_tokens > 0
    other.index.check_integrity()


def test_null_store(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    comm = KVComm.from_model(model, tokenizer, config=Config(), store=NullStore())
    for _ in range(2):
        assert answer(comm, messages("clerk")).report.reused_tokens == 0


def test_mode_off(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    comm = KVComm.from_model(model, tokenizer, config=Config(mode="off"))
    for _ in range(2):
        out = answer(comm, messages("clerk"))
        assert out.report.fallback == "mode-off"
        assert out.ttft_ms > 0
        assert out.token_ids == plain(model, comm.encode(messages("clerk")))
    assert not comm.store.segments()


def test_attach_is_plain_generate_with_nothing_to_reuse(comm: KVComm, model: PreTrainedModel) -> None:
    ids = comm.encode(messages("clerk"))
    expected = plain(model, ids)
    with comm.attach(model):
        assert plain(model, ids) == expected
    assert len(comm.reports) == 1


def test_generate_inside_attach_is_one_request(comm: KVComm, model: PreTrainedModel) -> None:
    with comm.attach(model):
        out = answer(comm, messages("clerk"), agent="clerk")
        again = answer(comm, messages("clerk"), agent="clerk")
    assert [r.fallback for r in comm.reports] == ["nothing-known", None]
    assert [out.report, again.report] == list(comm.reports)
    assert out.token_ids == again.token_ids == plain(model, comm.encode(messages("clerk")))


def test_attach_undoes_itself(comm: KVComm, model: PreTrainedModel) -> None:
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    with pytest.raises(ZeroDivisionError), comm.attach(model), comm.acting("critic"):
        raise ZeroDivisionError
    assert "generate" not in vars(model)
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks


def test_attach_after_an_exception_inside_generate(comm: KVComm, model: PreTrainedModel) -> None:
    def stop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    ids = comm.encode(messages("clerk"))
    with comm.attach(model):
        with pytest.raises(ZeroDivisionError):
            plain(model, ids, logits_processor=[stop])
        assert plain(model, ids)
    assert plain(model, ids)
    assert len(model._forward_hooks) == 0


def test_attach_twice_or_to_a_stranger(comm: KVComm, model: PreTrainedModel) -> None:
    with comm.attach(model), pytest.raises(InputError, match="already"), comm.attach(model):
        pass
    with pytest.raises(InputError, match="another model"), comm.attach(tiny_random("llama")):
        pass


def test_attach_knows_who_asks(comm: KVComm, model: PreTrainedModel) -> None:
    ids = comm.encode(messages("clerk"))
    with comm.attach(model), comm.acting("critic", tenant="x"):
        plain(model, ids)
    assert comm.reports[-1].agent == "critic"
    assert {s.tenant for s in comm.store.segments()} == {"x"}


def test_who_asks_is_inherited(comm: KVComm) -> None:
    """By generate and stream inside acting, as far as they say nothing else."""
    with comm.acting("critic", rule="exact", tenant="x"):
        answer(comm, messages("clerk"))
        assert answer(comm, messages("analyst")).report.agent == "critic"
        assert all(s.rung == "exact" for s in comm.reports[-1].spans)
        stream = comm.stream(messages("analyst"), rule="auto", max_new_tokens=4, do_sample=False)
        assert stream.output.report.reused_tokens > 0
        assert answer(comm, messages("clerk"), agent="clerk", tenant="y").report.fallback == "nothing-known"
    assert [r.agent for r in comm.reports] == ["critic", "critic", "critic", "clerk"]
    assert {s.tenant for s in comm.store.segments()} == {"x", "y"}


def test_refused_calls_are_left_alone(comm: KVComm, model: PreTrainedModel) -> None:
    ids = torch.tensor([comm.encode(messages("clerk"))] * 2)
    with comm.attach(model):
        out = generate(model, ids, max_new_tokens=4, do_sample=False)
    assert out[0].tolist() == out[1].tolist()
    assert "batch of 2" in (comm.reports[-1].fallback or "")
    assert not comm.store.segments()


def test_returned_cache_stays_the_callers(comm: KVComm, model: PreTrainedModel) -> None:
    """A cache handed out with the answer is not written to by later requests."""
    ids = torch.tensor([comm.encode(messages("clerk"))])
    with comm.attach(model):
        out = generate(model, ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        before = out.past_key_values.layers[0].keys.clone()
        answer_ids = torch.tensor([comm.encode(messages("analyst"))])
        generate(model, answer_ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(out.past_key_values.layers[0].keys, before)


class Say(LogitsProcessor):
    """The model says just these tokens after a prompt of that length."""

    def __init__(self, tokens: list[int], after: int) -> None:
        self.tokens, self.after = tokens, after

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self.tokens[input_ids.shape[1] - self.after]] = 0
        return only  # type: ignore[return-value]  # a float tensor


@pytest.mark.parametrize("known", [False, True], ids=["dense", "shared"])
def test_a_returned_cache_is_what_generate_returns(
    comm: KVComm, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: bool
) -> None:
    """An answer that is learned, and whose last token has no KV yet: tokens, length and contents of the cache, and what
    follows when it is continued, against transformers alone.
    """
    words = tokenizer.encode(WORDS, add_special_tokens=False)
    ids = torch.tensor([comm.encode(messages("clerk"))])
    options: dict[str, Any] = {
        "max_new_tokens": len(words),
        "do_sample": False,
        "logits_processor": [Say(words, ids.shape[1])],
        "return_dict_in_generate": True,
    }
    expected = generate(model, ids, **options)
    if known:
        answer(comm, messages("clerk"))
    with comm.attach(model):
        ours = generate(model, ids, **options)
    assert bool(comm.reports[-1].reused_tokens) == known
    assert any(s.start == ids.shape[1] and s.ids.tolist() == words for s in comm.store.segments()), "the answer was learned"
    assert torch.equal(ours.sequences, expected.sequences)
    assert ours.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == ids.shape[1] + len(words) - 1
    for a, b in zip(ours.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.values, b.values, rtol=1e-3, atol=1e-4)
    onward = [
        generate(model, out.sequences, past_key_values=out.past_key_values, max_new_tokens=8, do_sample=False)
        for out in (ours, expected)
    ]
    assert torch.equal(*onward)


def test_an_answer_that_ends_at_the_switch_of_its_rope(tokenizer: PreTrainedTokenizerBase) -> None:
    """Longrope with other tables beyond 40 tokens: 40 tokens are cached, and the end token, the 41st, was never fed back. What
    is stored has the keys of a dense forward over the 40, and says so.
    """
    model = tiny_random("phi3-longrope", vocab_size=768)
    comm = KVComm.from_model(model, tokenizer, config=Config())
    words = tokenizer.encode(WORDS, add_special_tokens=False)
    end = int(tokenizer.eos_token_id)
    ids = torch.randint(20, 700, (1, 40 - len(words)), generator=torch.Generator().manual_seed(1))
    with comm.attach():
        said = generate(model, ids, max_new_tokens=99, eos_token_id=end, logits_processor=[Say([*words, end], ids.shape[1])])
    assert said.shape[1] == 41
    [segment] = [s for s in comm.store.segments() if s.start == ids.shape[1]]
    kv = comm.store.get(segment.key)
    assert kv is not None
    assert (kv.length, segment.length, segment.exact) == (40, 1, True)
    for keys, (k, _) in zip(kv.keys, dense_kv(model, ids[0].tolist(), words), strict=True):
        torch.testing.assert_close(keys, k, atol=1e-4, rtol=1e-3)


def test_streaming(comm: KVComm) -> None:
    whole = answer(comm, messages("clerk"))
    stream = comm.stream(messages("clerk"), max_new_tokens=12, do_sample=False)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces).strip() == whole.text == stream.output.text
    assert stream.output.report.reused_tokens > 0


def test_streaming_encodes_once(comm: KVComm, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []
    encode = comm.encode

    def counting(prompt: Any) -> list[int]:
        encoded.append(prompt)
        return encode(prompt)

    monkeypatch.setattr(comm, "encode", counting)
    list(comm.stream("bob", max_new_tokens=2))
    assert encoded == ["bob"]


def test_streaming_errors(comm: KVComm) -> None:
    with pytest.raises(InputError):
        comm.stream("")

    def explode(*_: object) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(comm.stream("bob", logits_processor=[explode]))


def test_requests_from_several_threads(comm: KVComm, model: PreTrainedModel) -> None:
    """Eight threads, the answers of transformers alone; nothing of one request leaks into another."""
    roles = ["clerk", "analyst", "old clerk", "quiet analyst"] * 2
    expected = {role: plain(model, comm.encode(messages(role))) for role in set(roles)}
    got: dict[int, list[int]] = {}

    def work(i: int) -> None:
        got[i] = answer(comm, messages(roles[i]), rule="exact", agent=roles[i]).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(roles))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [got[i] for i in range(len(roles))] == [expected[r] for r in roles]


@pytest.fixture
def other_weights() -> PreTrainedModel:
    return tiny_random("llama", vocab_size=768, max_position_embeddings=600, initializer_range=0.2)


def test_kv_never_crosses_models(comm: KVComm, other_weights: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """One store and index, two models of the same shapes: nothing of the one is used for the other."""
    answer(comm, messages("clerk"))
    other = KVComm.from_model(other_weights, tokenizer, config=Config(), store=comm.store)
    other.index = comm.index
    assert other.backend.fingerprint != comm.backend.fingerprint
    assert answer(other, messages("clerk")).report.reused_tokens == 0


def test_a_segment_is_its_content_and_context() -> None:
    ids, other = np.arange(20, dtype=np.int32), np.arange(20, dtype=np.int32)[::-1].copy()
    keys = {
        Segment(ids, ids[:n], fp, tenant, exact=e).key
        for n in (0, 5)
        for fp in "ab"
        for tenant in ("", "t")
        for e in (True, False)
    }
    assert len(keys) == 16
    assert Segment(other, ids[:0], "a").key not in keys
    assert Segment(ids, ids[:5], "a", producer="x").key == Segment(ids, ids[:5], "a", producer="y").key
