"""`kvcomm bench ttft`: time to first token of five fully connected agents, the paper's setting (section 4.3).

    agent i reads  | its own prefix (512) | shared input (1,024) | outputs (512 each) of the agents before it | closing text |

Four arms on the same prompts in one run, their order changing from repetition to repetition:

    dense         no cache
    prefix_cache  the best that an exact prefix cache does: the KV of the agent's own prefix is already in place. The rest is
                  prefilled at once or in blocks, whichever was the fastest in warm-up (behind a prefix, attention needs a whole
                  mask and may cost more than it saves), and never counts as slower than dense: the cache may be ignored
    shared        kvcomm: everything of ours included
    exact_hit     the limit: the KV of all tokens but the last is already in place

All arms are timed from the same place, the call of the model's generate, to the first token's logits, with the same model,
attention and kind of preallocated cache. An agent's output is given; its KV is what decoding it in its producer's context would
have left (one dense forward over prompt and output). Prefixes differ by one token in length, so that no segment lies at its old
place.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kvcomm.backends.hf import HFBackend
from kvcomm.backends.loading import dtype_named, load
from kvcomm.backends.span_cache import SpanCache
from kvcomm.config import Config
from kvcomm.engine import KVComm
from kvcomm.errors import InputError
from kvcomm.report import document, dumps, write_json
from kvcomm.segments import ReuseReport, Segment, SegmentKV

__all__ = ["VOCABULARY", "add_arguments", "first_token", "measure", "random_model", "ratios", "run", "worst"]

ARMS = ("dense", "prefix_cache", "shared", "exact_hit")
BLOCKS = (1024, 512)  # tokens per forward that the prefix-cache arm tries, besides all at once
VOCABULARY = 32000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm bench ttft`."""
    parser.add_argument(
        "--model",
        default="random:1024x16x16x8",
        metavar="ID",
        help="Hugging Face id or folder, or random:<hidden>x<layers>x<heads>x<kv_heads>",
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--agents", type=int, default=5)
    parser.add_argument("--prefix", type=int, default=512, help="tokens of an agent's own prefix")
    parser.add_argument("--input", type=int, default=1024, help="tokens of the shared input")
    parser.add_argument(
        "--output",  # the paper's parameter has the name of the shared flag: a number is meant as tokens
        action="append",
        default=[],
        metavar="N|DIR",
        help="tokens of an agent's output (default: 512), or the results' folder; may be repeated",
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)


@dataclass(frozen=True)
class Prompt:
    """One agent's prompt and the output it will give, as token ids."""

    prefix: list[int]
    ids: list[int]  # the whole prompt, prefix included
    answer: list[int]


def random_model(spec: str, dtype: torch.dtype) -> HFBackend:
    """A Llama of the given sizes with random weights: times do not depend on them. Raises InputError for a malformed spec."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = re.fullmatch(r"random:(\d+)x(\d+)x(\d+)x(\d+)", spec)
    if not found:
        raise InputError(
            f"--model is {spec!r}; a random model is random:<hidden>x<layers>x<heads>x<kv_heads>, "
            "for example random:1024x16x16x8"
        )
    hidden, layers, heads, kv_heads = map(int, found.groups())
    if not hidden or not layers or not heads or not kv_heads or hidden % heads or heads % kv_heads or (hidden // heads) % 2:
        raise InputError(f"{spec}: heads must divide hidden into even parts and kv_heads must divide heads")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=1 << 17, dtype=dtype,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)  # transformers' annotation of `to` lost its first parameter
    return HFBackend(model.to(dtype).eval())


def prompts(args: argparse.Namespace, answer_tokens: int, vocabulary: int) -> list[Prompt]:
    """The team's prompts: random ids, so that nothing but what is shared by design repeats."""
    rng = random.Random(args.seed)

    def text(tokens: int) -> list[int]:
        return [rng.randrange(10, vocabulary) for _ in range(tokens)]

    shared, closing = text(args.input), text(12)
    said: list[int] = []
    out = []
    for i in range(args.agents):
        prefix, answer = text(args.prefix + i), text(answer_tokens)
        out.append(Prompt(prefix, [*prefix, *shared, *said, *closing], answer))
        said += [*text(4), *answer]  # a header in front of every output
    return out


class Known:
    """The KV that earlier calls left, kept outside any engine: every repetition starts with just this, whatever it learns."""

    def __init__(self, backend: HFBackend) -> None:
        self.backend = backend
        self.parts: list[tuple[Segment, SegmentKV]] = []

    def keep(self, cache: SpanCache, ids: list[int], start: int, end: int, producer: str) -> None:
        """Tokens [start, end) of `ids`, whose KV `cache` holds."""
        whole = np.asarray(ids, dtype=np.int32)
        segment = Segment(whole[start:end].copy(), whole[:start].copy(), self.backend.fingerprint, producer=producer)
        self.parts.append((segment, self.backend.read(cache, start, end, len(ids))))

    def engine(self) -> KVComm:
        comm = KVComm(self.backend, config=Config())
        for segment, kv in self.parts:
            comm.store.put(segment, kv)
            comm.index.add(segment)
        return comm


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns its JSON document."""
    answer_tokens = next((int(x) for x in args.output if x.isdigit()), 512)
    for name, value in (
        ("output", answer_tokens),
        *((n, getattr(args, n)) for n in ("agents", "prefix", "input", "repetitions")),
    ):
        if value < 1:
            raise InputError(f"--{name} is {value}; it must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = dtype_named(args.dtype)
    backend = random_model(args.model, dtype) if args.model.startswith("random:") else load(args.model, dtype=dtype)
    team = prompts(args, answer_tokens, int(backend.model.config.get_text_config().vocab_size))
    limit = backend.context_limit
    if limit is not None and len(team[-1].ids) + 1 > limit:
        raise InputError(
            f"agent {args.agents} reads {len(team[-1].ids)} tokens, the model's context is {limit}; use smaller sizes"
        )
    known, agents = Known(backend), []
    with tqdm(total=args.agents * args.repetitions * len(ARMS), disable=args.quiet, leave=False) as bar:
        for i, prompt in enumerate(team):
            agents.append(_agent(known, i, prompt, args, bar.update))
    return document(
        "kvcomm.bench.ttft/1",
        model=args.model,
        dtype=args.dtype,
        threads=torch.get_num_threads(),
        attention=backend.model.config._attn_implementation,
        prefix_tokens=args.prefix,
        input_tokens=args.input,
        output_tokens=answer_tokens,
        repetitions=args.repetitions,
        agents=agents,
        later_agents=ratios(agents[1:]),
    )


class Arms:
    """One prompt under every arm. A method named for an arm runs it once and returns milliseconds to the first token."""

    def __init__(self, known: Known, prompt: Prompt, place: SpanCache) -> None:
        """`place` holds the KV of the whole prompt, and is what the arms but `shared` write to."""
        self.known, self.place = known, place
        self.ids = torch.tensor([prompt.ids])
        self.prefix = len(prompt.prefix)
        self.block = len(prompt.ids) - self.prefix  # tokens per forward of the prefix-cache arm
        self.reports: list[ReuseReport] = []

    def warm_up(self) -> None:
        """Chooses the prefix-cache arm's blocks, and runs what no call before it has run."""
        self.block = min((self.block, *(b for b in BLOCKS if b < self.block)), key=lambda b: self._held(self.prefix, b))
        self.shared()
        self.exact_hit()
        self.reports.clear()

    def dense(self) -> float:
        return self._held(0)

    def prefix_cache(self) -> float:
        return self._held(self.prefix, self.block)

    def shared(self) -> float:
        comm = self.known.engine()
        with comm.attach():
            ms = first_token(self.known.backend, self.ids)
        self.reports.append(comm.reports[-1])
        return ms

    def exact_hit(self) -> float:
        return self._held(self.ids.shape[1] - 1)

    def _held(self, tokens: int, block: int | None = None) -> float:
        self.place.set_length(tokens)
        return first_token(self.known.backend, self.ids, self.place, block)


@torch.no_grad()
def _agent(known: Known, i: int, prompt: Prompt, args: argparse.Namespace, tick: Callable[[], object]) -> dict[str, Any]:
    """All arms for one agent, in changing order; afterwards its prompt and output are known."""
    backend, producer = known.backend, f"agent {i + 1}"
    place = backend.cache(len(prompt.ids) + len(prompt.answer))
    backend.model(input_ids=torch.tensor([prompt.ids]), past_key_values=place, use_cache=True, logits_to_keep=1)
    known.keep(place, prompt.ids, 0, len(prompt.prefix), producer)
    arms = Arms(known, prompt, place)
    arms.warm_up()
    rng = random.Random(args.seed + i)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(args.repetitions):
        for arm in rng.sample(ARMS, len(ARMS)):
            times[arm].append(getattr(arms, arm)())
            tick()
    place.set_length(len(prompt.ids))
    backend.model(input_ids=torch.tensor([prompt.answer]), past_key_values=place, use_cache=True, logits_to_keep=1)
    everything = [*prompt.ids, *prompt.answer]
    if i == 0:  # of later agents' prompts, what is new is their prefix: it is known already
        known.keep(place, everything, len(prompt.prefix), len(prompt.ids), producer)
    known.keep(place, everything, len(prompt.ids), len(everything), producer)
    backend.release(place)
    return {"agent": i + 1, "prompt_tokens": len(prompt.ids), **_numbers(times, arms)}


def _numbers(times: dict[str, list[float]], arms: Arms) -> dict[str, Any]:
    """Medians of one agent. `all_ms` holds what was measured, the prefix-cache arm as it ran."""
    ms = {arm: median(values) for arm, values in times.items()}
    ms["prefix_cache"] = min(ms["prefix_cache"], ms["dense"])
    last = arms.reports[-1]
    return {
        "reused_tokens": last.reused_tokens,
        "computed_tokens": last.computed_tokens,
        "tokens_by_rung": last.tokens_by_rung,
        **{f"{arm}_ms": value for arm, value in ms.items()},
        "all_ms": times,
        "prefix_cache_block_tokens": arms.block,
        "shared_split_ms": {
            k: median(getattr(r, f"{k}_ms") for r in arms.reports) for k in ("match", "plan", "assemble", "forward")
        },
    }


def first_token(backend: HFBackend, ids: torch.Tensor, cache: SpanCache | None = None, block: int | None = None) -> float:
    """Milliseconds from the call to the first token's logits. Behind what `cache` holds, `block` tokens at most per forward."""
    model: Any = backend.model  # transformers leaves `generate` loosely typed
    options = {} if cache is None else {"past_key_values": cache}
    first: list[float] = []
    began = perf_counter()
    if cache is not None and block is not None:
        held = cache.get_seq_length()
        *ahead, _ = ids[:, held:].chunk(-(-(ids.shape[1] - held) // block), dim=1)
        for part in ahead:
            model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    with backend.hooked(lambda _: first.append(perf_counter())):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, **options)
    return (first[0] - began) * 1e3


def ratios(agents: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """The worst agent's ratios: each claim holds for every agent."""
    if not agents:
        return None
    return {
        "dense_over_shared_min": min(a["dense_ms"] / a["shared_ms"] for a in agents),
        "prefix_cache_over_shared_min": min(a["prefix_cache_ms"] / a["shared_ms"] for a in agents),
        "shared_over_exact_hit_max": max(a["shared_ms"] / a["exact_hit_ms"] for a in agents),
    }


def worst(ratios: dict[str, float]) -> str:
    """What `ratios` gave, as a line."""
    return (
        f"agents 2 and later, the worst of them: dense / shared {ratios['dense_over_shared_min']:.1f}, "
        f"prefix cache / shared {ratios['prefix_cache_over_shared_min']:.1f}, "
        f"shared / exact hit {ratios['shared_over_exact_hit_max']:.2f}"
    )


def run(args: argparse.Namespace) -> int:
    doc = measure(args)
    if args.format == "json":
        print(dumps(doc))
    else:
        print(
            f"{doc['model']}, {doc['dtype']}, {doc['threads']} threads; "
            f"median of {doc['repetitions']}, milliseconds to first token"
        )
        print(f"{'agent':>6} {'tokens':>7} {'reused':>7} {'dense':>10} {'prefix':>10} {'shared':>10} {'exact hit':>10}")
        for a in doc["agents"]:
            print(
                f"{a['agent']:>6} {a['prompt_tokens']:>7} {a['reused_tokens']:>7} {a['dense_ms']:>10.1f} "
                f"{a['prefix_cache_ms']:>10.1f} {a['shared_ms']:>10.1f} {a['exact_hit_ms']:>10.1f}"
            )
        if doc["later_agents"]:
            print(worst(doc["later_agents"]))
    for folder in (Path(x) for x in args.output if not x.isdigit()):
        write_json(folder / "ttft.json", doc)
    return 0
