"""What code sees that calls an attached model's generate itself: what the same call gives without us, whatever goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvcomm.backends.span_cache import SpanCache
from kvcomm.config import Config
from kvcomm.engine import KVComm
from kvcomm.testing import tiny_random

N = 120


def ids(seed: int, tokens: int = N) -> Tensor:
    """A prompt [1, tokens]: all have tokens 20 to 99 in common."""
    own, common = (torch.randint(3, 200, (1, 400), generator=torch.Generator().manual_seed(s)) for s in (seed, 0))
    return torch.cat([own[:, :20], common[:, 20:100], own[:, 100:]], dim=1)[:, :tokens]


def generate(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
    """Whatever `model.generate` is now; transformers leaves it loosely typed."""
    loose: Any = model
    return loose.generate(*args, **{"max_new_tokens": 8, "do_sample": False, **options})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_random("llama")


@pytest.fixture
def comm(model: PreTrainedModel) -> KVComm:
    """It knows what all prompts have in common."""
    comm = KVComm.from_model(model, config=Config())
    with comm.attach():
        generate(model, ids(1))
    assert not faults(comm)
    return comm


def faults(comm: KVComm) -> int:
    kinds = ("assemble", "learn", "plan", "poisoned", "refusal", "shared")
    return sum(comm.counters.value("faults", kind) for kind in kinds)


def poison(comm: KVComm) -> None:
    """NaN into every stored value, behind the store's back."""
    for segment in comm.store.segments():
        kv = comm.store.get(segment.key)
        assert kv is not None
        for value in kv.values:
            value.data.fill_(float("nan"))  # .data: the write is not counted


# --- arguments by position --------------------------------------------------------------------------------------------------

POSITIONAL: dict[str, tuple[dict[str, Any], str]] = {
    "chunks": ({"prefill_chunk_size": 16}, "the prefill is chunked"),
    "no cache": ({"use_cache": False}, "use_cache is off"),
    "static cache": ({"cache_implementation": "static"}, "a cache implementation is chosen"),
    "padding": (
        {"pad_token_id": int(ids(2)[0, 50])},
        "the prompt holds the padding token and has no attention mask",
    ),
}


@pytest.mark.parametrize("name", sorted(POSITIONAL))
def test_settings_that_are_given_by_position(comm: KVComm, model: PreTrainedModel, name: str) -> None:
    setting, reason = POSITIONAL[name]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, **setting)
    loose: Any = model
    expected = loose.generate(ids(2), config)
    with comm.attach():
        assert torch.equal(loose.generate(ids(2), config), expected)
    assert comm.reports[-1].fallback == reason
    assert not faults(comm)


def test_a_call_by_position_is_served(comm: KVComm, model: PreTrainedModel) -> None:
    loose: Any = model
    with comm.attach():
        by_name = generate(model, inputs=ids(2))
        by_position = loose.generate(ids(2), GenerationConfig(max_new_tokens=8, do_sample=False))
    assert comm.reports[-2].reused_tokens > 50
    assert comm.reports[-1].reused_tokens > 50
    assert by_name.shape == by_position.shape


def test_a_call_that_cannot_be_made(comm: KVComm, model: PreTrainedModel) -> None:
    """generate's own TypeError, and nothing on record."""
    loose: Any = model
    with comm.attach(), pytest.raises(TypeError):
        loose.generate(*range(20))
    assert len(comm.reports) == 1


# --- what is exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope"])
def test_nothing_is_exact_under_other_rotary_tables(family: str) -> None:
    """A prompt of 36 tokens and one of 72 that begins with it, on either side of the switch at 40, and the latter again:
    logits of rule exact against plain generate, spans of rule auto.
    """
    model = tiny_random(family)
    options: dict[str, Any] = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}

    def ask(tokens: int) -> Tensor:
        with torch.no_grad():
            model.get_decoder()(input_ids=torch.tensor([[5]]))  # tables of a longer prompt before leave no trace
        logits: Tensor = generate(model, ids(1, tokens), **options).logits[0]
        return logits

    expected = {tokens: ask(tokens) for tokens in (36, 72)}
    exact, auto = (KVComm.from_model(model, config=Config()) for _ in range(2))
    for tokens in (36, 72, 72):
        with exact.attach(), exact.acting("judge", rule="exact"):
            torch.testing.assert_close(ask(tokens), expected[tokens], rtol=0, atol=1e-4)
        with auto.attach():
            ask(tokens)
    assert [[span.rung for span in r.spans] for r in exact.reports] == [[], [], ["exact"]]
    assert [[span.rung for span in r.spans] for r in auto.reports][:2] == [[], ["boundary"]]


# --- the time to first token ------------------------------------------------------------------------------------------------


def test_waiting_for_others_counts(comm: KVComm, model: PreTrainedModel) -> None:
    """While another request has its turn for 0.2 s; matching is not blamed for it."""

    def work() -> None:
        generate(model, ids(2))

    with comm.attach():
        thread = threading.Thread(target=work)
        with comm._lock:
            thread.start()
            time.sleep(0.2)
        thread.join()
    report = comm.reports[-1]
    assert report.ttft_ms is not None
    assert report.ttft_ms >= 150
    assert report.match_ms is not None
    assert report.match_ms < report.ttft_ms - 100


def test_deciding_counts(comm: KVComm, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that takes 0.2 s delays the first token by as much."""

    def slow(*_: object) -> str:
        time.sleep(0.2)
        return "slowly refused"

    monkeypatch.setattr(comm.backend, "refusal", slow)
    with comm.attach():
        generate(model, ids(2))
    report = comm.reports[-1]
    assert report.fallback == "slowly refused"
    assert report.ttft_ms is not None
    assert report.ttft_ms >= 200


# --- faults -----------------------------------------------------------------------------------------------------------------


def explode(*_: object, **__: object) -> Any:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("broken", ["refusal", "cache", "fill", "arm"])
def test_a_fault_of_the_backend(comm: KVComm, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    expected = generate(model, ids(2))
    monkeypatch.setattr(comm.backend, broken, explode)
    with comm.attach():
        assert torch.equal(generate(model, ids(2)), expected)
    assert (comm.reports[-1].fallback or "").startswith("fault: ")
    assert "out of memory" in (comm.reports[-1].fallback or "")
    assert comm.reports[-1].reused_tokens == 0
    assert comm.reports[-1].ttft_ms is not None
    assert faults(comm) == 1


@pytest.mark.parametrize("known", [True, False])
def test_a_fault_inside_the_first_forward(
    comm: KVComm, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Of a pass, or of a dense prefill through our cache: plain generate answers."""
    prompt = ids(2) if known else ids(2).flip(1)
    expected = generate(model, prompt)
    monkeypatch.setattr(SpanCache, "update", explode)
    with comm.attach():
        assert torch.equal(generate(model, prompt), expected)
    assert (comm.reports[-1].fallback or "").startswith("fault: ")
    assert faults(comm) == 1


@pytest.mark.parametrize("prompt", [ids(2), ids(2).flip(1)], ids=["known", "unknown"])
def test_errors_that_plain_generate_raises_too(comm: KVComm, model: PreTrainedModel, prompt: Tensor) -> None:
    with pytest.raises(ValueError, match="max_new_tokens") as plain:
        generate(model, prompt, max_new_tokens=-1)
    with comm.attach(), pytest.raises(ValueError, match="max_new_tokens") as ours:
        generate(model, prompt, max_new_tokens=-1)
    assert str(ours.value) == str(plain.value)
    assert not faults(comm)


def test_errors_behind_the_first_token_are_the_callers(comm: KVComm, model: PreTrainedModel) -> None:
    """Raised once, not tried again."""
    calls: list[int] = []

    def stop(*_: object) -> Tensor:
        calls.append(1)
        raise ZeroDivisionError

    with comm.attach(), pytest.raises(ZeroDivisionError):
        generate(model, ids(2), logits_processor=[stop])
    assert len(calls) == 1
    assert not faults(comm)


def test_a_huge_allowance_reserves_little(comm: KVComm, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand million tokens allowed, 300 wanted: room for 256 is made, and it grows."""
    options: dict[str, Any] = {
        "max_new_tokens": 1_000_000_000,
        "stopping_criteria": [lambda tokens, scores: torch.tensor([tokens.shape[1] >= N + 300])],
    }
    asked: list[int] = []
    cache = comm.backend.cache

    def recorded(tokens: int) -> SpanCache:
        asked.append(tokens)
        return cache(min(tokens, 10_000))

    prompt = ids(2).flip(1)
    expected = generate(model, prompt, **options)
    monkeypatch.setattr(comm.backend, "cache", recorded)
    with comm.attach():
        assert torch.equal(generate(model, prompt, **options), expected)
    assert asked == [N + 256]
    assert not faults(comm)


# --- streamers --------------------------------------------------------------------------------------------------------------


class Recorder(BaseStreamer):
    """A streamer that keeps what it is given; `fails`: at the first piece."""

    def __init__(self, fails: bool = False) -> None:
        self.pieces: list[list[int]] = []
        self.ended, self.fails = 0, fails

    def put(self, value: Tensor) -> None:
        if self.fails:
            raise BrokenPipeError("nobody listens")
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def by_name(model: PreTrainedModel, streamer: Recorder) -> Any:
    return generate(model, ids(2), streamer=streamer)


def by_position(model: PreTrainedModel, streamer: Recorder) -> Any:
    return generate(model, ids(2), None, None, None, None, None, None, streamer)


def break_forward(comm: KVComm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpanCache, "update", explode)


@pytest.mark.parametrize("call", [by_name, by_position])
@pytest.mark.parametrize("harm", [lambda comm, _: poison(comm), break_forward], ids=["NaN", "error"])
def test_the_prompt_is_streamed_once(
    comm: KVComm,
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[PreTrainedModel, Recorder], Any],
    harm: Callable[[KVComm, pytest.MonkeyPatch], None],
) -> None:
    """When a request starts again, a streamer gets what plain generate gives it."""
    plain, ours = Recorder(), Recorder()
    expected = call(model, plain)
    harm(comm, monkeypatch)
    with comm.attach():
        assert torch.equal(call(model, ours), expected)
    assert faults(comm) == 1
    assert ours.pieces == plain.pieces
    assert ours.ended == plain.ended == 1


def test_a_streamer_that_fails(comm: KVComm, model: PreTrainedModel) -> None:
    with comm.attach(), pytest.raises(BrokenPipeError, match="nobody listens"):
        by_name(model, Recorder(fails=True))
    assert not faults(comm)


# --- who asks ---------------------------------------------------------------------------------------------------------------


def in_a_thread(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_thread_without_context_shares_nothing_while_somebody_acts(comm: KVComm, model: PreTrainedModel) -> None:
    """Threads start without the context that they are started in, so a request of theirs might be anybody's."""
    before = {segment.key for segment in comm.store.segments()}
    with comm.attach():
        with comm.acting("critic", rule="exact", tenant="x"):
            in_a_thread(lambda: generate(model, ids(2)))
            assert (comm.reports[-1].fallback or "").startswith("nobody knows who asks")
            assert {segment.key for segment in comm.store.segments()} == before
            with comm.acting("clerk"):
                generate(model, ids(2))
            assert (comm.reports[-1].agent, comm.reports[-1].fallback) == ("clerk", "nothing-known")
        in_a_thread(lambda: generate(model, ids(3)))
    assert comm.reports[-1].reused_tokens > 50, "nobody acts any more"
    assert comm.counters.value("fallbacks", "nobody knows who asks") == 1


def test_attach_says_who_threads_are(comm: KVComm, model: PreTrainedModel) -> None:
    with comm.attach(agent="writer", tenant="x"):
        in_a_thread(lambda: generate(model, ids(2)))
        assert (comm.reports[-1].agent, comm.reports[-1].fallback) == ("writer", "nothing-known")
        in_a_thread(lambda: generate(model, ids(3)))
        assert comm.reports[-1].reused_tokens > 50
        with comm.acting("critic"):
            generate(model, ids(4))
        assert comm.reports[-1].agent == "critic"
        assert comm.reports[-1].reused_tokens > 50, "the tenant is that of attach"
    assert {segment.tenant for segment in comm.store.segments()} == {"", "x"}
    with comm.attach():
        in_a_thread(lambda: generate(model, ids(5)))
    assert comm.reports[-1].agent == ""
