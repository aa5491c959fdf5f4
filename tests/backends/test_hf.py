"""generate with a pass inside it, and dense generate through our cache, against generate alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from kvcomm.backends.base import Backend
from kvcomm.backends.span_cache import SpanCache
from kvcomm.errors import CacheFault
from kvcomm.rope import relative
from kvcomm.testing import tiny_random

if TYPE_CHECKING:
    from tests.backends.conftest import Case

N = 72  # as in conftest
PLACES = ((0, 20), (22, 40), (40, 61))
SEAMS = torch.tensor([7, 20, 21, 40, 41, *range(61, N)])


class Recorder(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def sizes_of(case: Case, cache: SpanCache | None, **options: Any) -> tuple[Any, list[int]]:
    """What generate returns, and the tokens that each of its forwards computed."""
    sizes: list[int] = []
    hook = case.model.get_input_embeddings().register_forward_hook(lambda _, args, out: sizes.append(args[0].numel()))
    try:
        return case.generate(cache, **options), sizes[1:]  # without the one that resets
    finally:
        hook.remove()


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "n-best": {"do_sample": True, "num_return_sequences": 3},
    "beam": {"num_beams": 3},
    "n-best beams": {"num_beams": 4, "num_return_sequences": 2},
    "beam-sample": {"num_beams": 3, "do_sample": True},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "guidance": {"guidance_scale": 1.5},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("mode", ["greedy", "n-best", "beam-sample", "prompt lookup"])
def test_modes_equal_plain_generate(case: Case, mode: str) -> None:
    check_mode(case, mode)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_all_modes_equal_plain_generate(llama: Case, mode: str) -> None:
    check_mode(llama, mode)


def check_mode(case: Case, mode: str) -> None:
    """The tokens of generate alone, from the same number of forwards, of which the first computes R instead of N tokens."""
    options = MODES[mode]
    if mode == "prompt lookup" and case.backend.rope.follows_length:
        assert case.backend.refusal(case.ids, options) is not None
        return
    assert case.backend.refusal(case.ids, options) is None
    plain, plain_sizes = sizes_of(case, None, **options)
    cache = case.cache(case.same_place(*PLACES))
    case.backend.arm(cache, case.ids, SEAMS)
    with case.backend.hooked():
        shared, sizes = sizes_of(case, cache, **options)
    assert torch.equal(shared, plain)
    rows = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    assert plain_sizes[0] // rows - sizes[0] == N - len(SEAMS)
    assert sizes[1:] == plain_sizes[1:]


def test_assisted_decoding_equals_plain_generate(case: Case) -> None:
    """A small model drafts; the first forward holds the prompt and its draft."""
    if case.backend.rope.follows_length:
        assert case.backend.refusal(case.ids, {"assistant_model": tiny_random("llama")}) is not None
        return
    for assistant in (tiny_random("llama", num_hidden_layers=1), copy.deepcopy(case.model)):
        assert case.backend.refusal(case.ids, {"assistant_model": assistant}) is None
        plain = case.generate(assistant_model=assistant)
        cache = case.cache(case.same_place(*PLACES))
        case.backend.arm(cache, case.ids, SEAMS)
        with case.backend.hooked():
            shared = case.generate(cache, assistant_model=assistant)
        assert torch.equal(shared, plain)


def test_streaming_and_scores_equal_plain_generate(llama: Case) -> None:
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    streams = Recorder(), Recorder()
    plain = llama.generate(streamer=streams[0], **options)
    cache = llama.cache(llama.same_place(*PLACES))
    llama.backend.arm(cache, llama.ids, SEAMS)
    with llama.backend.hooked():
        shared = llama.generate(cache, streamer=streams[1], **options)
    assert streams[0].ended
    assert streams[1].ended
    assert streams[0].pieces == streams[1].pieces
    assert torch.equal(shared.sequences, plain.sequences)
    for a, b in zip((*shared.scores, *shared.logits), (*plain.scores, *plain.logits), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_the_returned_cache_can_be_continued(llama: Case) -> None:
    cache = llama.cache(llama.same_place(*PLACES))
    llama.backend.arm(cache, llama.ids, SEAMS)
    with llama.backend.hooked():
        first = llama.generate(cache, return_dict_in_generate=True)
    assert first.past_key_values is cache
    longer: Any = llama.model.generate
    onward = longer(first.sequences, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(onward, longer(first.sequences, max_new_tokens=6, do_sample=False))


def test_dense_generate_through_our_cache_is_bit_equal(case: Case) -> None:
    """Nothing reused, prompts beyond the sliding windows too: same tokens, same logits bit for bit, and all K/V to be read."""
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    plain = case.generate(**options)
    cache = case.backend.cache(N)
    firsts: list[Tensor] = []
    with case.backend.hooked(firsts.append):
        ours = case.generate(cache, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.equal(ours.logits[0], plain.logits[0])
    assert torch.equal(firsts[0], plain.logits[0][0])
    assert len(firsts) == 1
    for a, b in zip(ours.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    read = case.backend.read(cache, 0, N, N)
    for mine, theirs in zip((*read.keys, *read.values), (*case.kv.keys, *case.kv.values), strict=True):
        assert torch.equal(mine, theirs)


def test_decoded_tokens_can_be_read(case: Case) -> None:
    """K/V of an answer against a dense forward over prompt and answer; the last token's is never in a cache."""
    cache = case.backend.cache(N)
    with case.backend.hooked():
        sequence = case.generate(cache)
    held = N + 7
    assert cache.get_seq_length() == held
    if not case.backend.rope.same(N, held):
        with pytest.raises(CacheFault, match="behind token 72 were rotated with other tables"):
            case.backend.read(cache, N, held, held)
        return
    read, (expected, _) = case.backend.read(cache, N, held, held), case.dense(sequence[:, :held])
    assert (read.start, read.length, read.tokens) == (N, held, 7)
    for mine, theirs in zip((*read.keys, *read.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(mine, theirs[:, N:], rtol=0, atol=1e-4)


def test_reading_is_copying(llama: Case) -> None:
    cache = llama.cache(llama.same_place((0, N - 1)))
    llama.backend.run(cache, llama.ids, torch.tensor([N - 1]))
    read = llama.backend.read(cache, 5, 9, N)
    before = read.keys[0].clone()
    cache.layers[0].k.zero_()
    assert torch.equal(read.keys[0], before)
    assert read.keys[0].is_contiguous()


@pytest.mark.parametrize(("start", "end"), [(0, N + 1), (5, 5), (-1, 4), (9, 5)])
def test_reading_what_is_not_there(llama: Case, start: int, end: int) -> None:
    cache = llama.cache(llama.same_place((0, N - 1)))
    llama.backend.run(cache, llama.ids, torch.tensor([N - 1]))
    with pytest.raises(CacheFault, match="holds 72"):
        llama.backend.read(cache, start, end, N)


def test_longrope_that_is_outgrown_while_decoding(make: Callable[..., Case]) -> None:
    """A prompt of 36 answered beyond the switch at 40, where Phi-3 drops its cache: as generate alone, and what lies beyond
    cannot be read.
    """
    case = make("phi3-longrope")
    ids = case.prompt(1, 36)
    generate: Any = case.model.generate
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = generate(ids, **options)
    kv, _ = case.dense(ids)
    cache = case.cache([(case.span(0, 30), kv)], 36)
    case.backend.arm(cache, ids, torch.arange(30, 36))
    with case.backend.hooked():
        shared = generate(ids, past_key_values=cache, **options)
    assert torch.equal(shared, plain)
    with pytest.raises(CacheFault):
        case.backend.read(cache, 36, 45, 46)


@pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope"])
def test_longer_prompts_before_leave_no_trace(make: Callable[..., Case], family: str) -> None:
    """Growing tables remember the longest sequence; a pass must not see that of another request."""
    case = make(family)
    case.dense(case.prompt(40, 300))
    logits = case.backend.run(case.cache(case.same_place(*PLACES)), case.ids, SEAMS)
    torch.testing.assert_close(logits, case.logits[-1], rtol=0, atol=1e-4)


def hooks_of(case: Case) -> int:
    return len(case.model._forward_hooks) + len(case.model._forward_pre_hooks)


def test_hooks_are_gone_and_an_unused_pass_with_them(llama: Case) -> None:
    cache = llama.cache(llama.same_place(*PLACES))
    llama.backend.arm(cache, llama.ids, SEAMS)
    with pytest.raises(KeyError, match="of the caller"), llama.backend.hooked():
        raise KeyError("of the caller")
    assert hooks_of(llama) == 0
    assert cache.get_seq_length() == 0
    assert torch.equal(llama.generate(cache), llama.generate())


def test_an_exception_inside_generate(llama: Case) -> None:
    """From the callback, the way NaN logits end a request: hooks gone, cache empty, the model answers as before."""

    def poisoned(_: Tensor) -> None:
        raise CacheFault("not a number")

    cache = llama.cache(llama.same_place(*PLACES))
    llama.backend.arm(cache, llama.ids, SEAMS)
    with pytest.raises(CacheFault, match="not a number"), llama.backend.hooked(poisoned):
        llama.generate(cache)
    assert hooks_of(llama) == 0
    llama.backend.release(cache)
    assert torch.equal(llama.generate(llama.backend.cache(N)), llama.generate())


def test_nan_in_known_kv_shows_in_the_first_logits(case: Case) -> None:
    cache = case.cache(case.same_place(*PLACES))
    cache.layers[0].v[0, 0, N - 15, 0] = torch.nan  # a known token, within every window
    case.backend.arm(cache, case.ids, torch.tensor([20, 21, *range(61, N)]))
    firsts: list[Tensor] = []
    with case.backend.hooked(firsts.append):
        case.generate(cache)
    assert bool(firsts[0].isnan().any())


def test_an_armed_cache_is_of_no_use_without_hooks(llama: Case) -> None:
    cache = llama.cache(llama.same_place(*PLACES))
    llama.backend.arm(cache, llama.ids, SEAMS)
    with pytest.raises(RuntimeError, match="hooked"):
        llama.generate(cache)
    with llama.backend.hooked():
        assert torch.equal(llama.generate(cache), llama.generate())


def test_a_pass_inside_a_hooked_call(llama: Case) -> None:
    """Hooks of two contexts at once turn one forward into one pass."""
    firsts: list[Tensor] = []
    with llama.backend.hooked(firsts.append):
        logits = llama.backend.run(llama.cache(llama.same_place(*PLACES)), llama.ids, SEAMS)
    torch.testing.assert_close(logits, llama.logits[-1], rtol=0, atol=1e-4)
    assert torch.equal(firsts[0], logits)
    assert hooks_of(llama) == 0


def test_other_threads_and_caches_are_left_alone(llama: Case) -> None:
    """While this thread is hooked, another generates with the same model, and this one without a cache of ours."""
    firsts: list[Tensor] = []
    answers: list[Tensor] = []
    with llama.backend.hooked(firsts.append):
        other = threading.Thread(target=lambda: answers.append(llama.generate()))
        other.start()
        other.join()
        assert not firsts
        answers.append(llama.generate())
    assert len(firsts) == 1
    assert torch.equal(answers[0], answers[1])


def test_inference_mode_leaves_buffers_that_can_be_used_again(llama: Case) -> None:
    expected = llama.generate()
    for _ in range(2):
        for mode in (True, False):
            with torch.inference_mode(mode):
                cache = llama.cache(llama.same_place(*PLACES))
                llama.backend.arm(cache, llama.ids, SEAMS)
                cache.layers[0].reserve(cache.capacity + 1)  # growing allocates, too
                assert not cache.layers[0].k.is_inference()
                with llama.backend.hooked():
                    assert torch.equal(llama.generate(cache), expected)
                read = llama.backend.read(cache, 3, N, N)
                llama.backend.release(cache)
            assert not any(x.is_inference() for x in read.keys)


def test_forwards_that_return_tuples_are_left_alone(llama: Case) -> None:
    with llama.backend.hooked(lambda _: pytest.fail("there are no logits to be shown")):
        assert isinstance(llama.model(llama.ids, return_dict=False), tuple)


def test_identity_is_that_of_the_model(llama: Case, make: Callable[..., Case]) -> None:
    assert llama.backend.fingerprint == make("llama").backend.fingerprint
    assert llama.backend.fingerprint != make("llama", seed=1).backend.fingerprint


def test_it_keeps_the_contract(llama: Case) -> None:
    """For the type checker; at run time, every member of the protocol is there."""
    backend: Backend = llama.backend
    members = {name for name in vars(Backend) if not name.startswith("_")} | Backend.__annotations__.keys()
    assert len(members) > 10
    assert all(hasattr(backend, name) for name in members)


def test_names(llama: Case) -> None:
    assert llama.backend.name == "LlamaForCausalLM"


def yarn(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, **more}}


@pytest.mark.parametrize(
    ("family", "overrides", "limit"),
    [
        ("llama", {}, 512),
        ("llama-llama3", {}, 512),
        ("gemma3", {}, 512),
        ("llama-yarn", {}, 512),  # 4 x 128
        ("llama", yarn(original_max_position_embeddings=128), 1024),
        ("llama", yarn(original_max_position_embeddings=32), 512),
        ("phi3-longrope", {}, 512),  # 12.8 x 40
        ("llama-linear", {}, None),
        ("llama-dynamic", {}, None),
    ],
)
def test_the_context_is_what_the_rope_reaches(
    make: Callable[..., Case], family: str, overrides: dict[str, Any], limit: int | None
) -> None:
    """factor x original where a rope is stretched and says both, nothing where it says less, else max_position_embeddings."""
    assert make(family, **overrides).backend.context_limit == limit


@pytest.mark.parametrize(
    ("family", "same"),
    [
        ("llama", [(1, 300), (36, 72)]),
        ("phi3-longrope", [(1, 40), (41, 300)]),
        ("llama-dynamic", [(1, 40), (72, 72)]),
    ],
)
def test_which_lengths_share_their_tables(make: Callable[..., Case], family: str, same: list[tuple[int, int]]) -> None:
    """The first layer's keys of one prefix, from plain forwards of both lengths, are equal where `same_tables` says so."""
    case = make(family)
    keys = {n: case.dense(case.prompt(1, 300)[:, :n])[0].keys[0][:, :30] for n in (30, 40, 41, 72, 300)}
    for (a, one), (b, other) in product(keys.items(), repeat=2):
        assert case.backend.same_tables(a, b) == (relative(one, other) < 1e-5)
    assert all(case.backend.same_tables(a, b) for a, b in same)
