"""`kvcomm bench soak`: thousands of mixed requests on a real vLLM that has few blocks and a small store, ten at a time.

    reused     asks kvcomm like everybody; its prompts are made of documents that come back, and are replaced now and then
    dense      kvcomm leaves it alone; vLLM's prefix cache, which all but tenants share, does not
    tenant     as `reused`, for one of two other tenants
    cancelled  as `reused`, and its client may leave at any time

Few blocks: requests are preempted and resumed. Then the same requests, in a process of its own again, go to a vLLM without
kvcomm: dense answers must be the same, and its memory is what ours is held against. What is expected of a run is in `checks`;
the exit code is 1 where one of them is false.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kvcomm.bench.ttft import random_model
from kvcomm.connectors.local import LocalEngine, need_vllm
from kvcomm.connectors.stats import reported
from kvcomm.errors import InputError, KVCommError
from kvcomm.report import document, dumps, write_json
from kvcomm.segments import ReuseReport

__all__ = ["LIMITS", "Asked", "Soak", "Soaked", "add_arguments", "distance", "measure", "reuse", "run"]

KINDS = {"reused": 0.55, "dense": 0.2, "tenant": 0.15, "cancelled": 0.1}
LIMITS: dict[str, Any] = {
    "num_gpu_blocks_override": 15,
    "max_num_seqs": 8,
    "tokens": 1024,
}  # blocks for about two of the requests
STORE_TOKENS = 9000  # a third of what the documents of all tenants come to
AT_ONCE = 10
SAME = 1e-4  # log-probabilities; engines that batch otherwise differ by about 1e-6
LEAST = 40  # requests; fewer hold too little of everything


@dataclass(eq=False)
class Asked:
    """One request and how it ended. Mutable: the end comes later."""

    kind: str
    ids: list[int]
    new: int
    ended: str | None = None  # vLLM's finish reason, or cancelled
    answer: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # of the answer's tokens
    report: ReuseReport | None = None


@dataclass(frozen=True)
class Soaked:
    """What came of the soak of one engine."""

    asked: list[Asked]
    resident_bytes: tuple[int | None, int | None]  # of its process, when half of the requests were sent and at the end
    preemptions: int
    faults: int
    version: str


class Soak:
    """Mixed requests for one engine. The same seed sends the same requests; who leaves when depends on the engine's steps."""

    def __init__(self, engine: LocalEngine, requests: int, seed: int) -> None:
        self.engine, self.requests = engine, requests
        self.rng, self._leave = np.random.default_rng(seed), np.random.default_rng(seed)
        self.asked: dict[str, Asked] = {}  # by the engine's name, in the order they were sent
        self._waiting: set[str] = set()
        self._documents = [self._text(n) for n in self.rng.integers(60, 220, 12)]

    def run(self, tick: Callable[[int], object] = lambda ended: None) -> list[Asked]:
        """All of them; `tick` is told after every step how many have ended in it."""
        core = self.engine.llm.llm_engine
        while len(self.asked) < self.requests or core.has_unfinished_requests():
            while len(self.asked) < self.requests and len(self._waiting) < AT_ONCE:
                self._send()
            before = len(self._waiting)
            for output in core.step():
                if output.finished:
                    self._end(output.request_id, output.outputs[0].finish_reason)
                    _note(self.asked[output.request_id], output)
            leaving = [name for name in self._waiting if self.asked[name].kind == "cancelled"]
            if leaving and self._leave.random() < 0.3:
                name = min(leaving, key=int)
                core.abort_request([name])
                self._end(name, "cancelled")
            tick(before - len(self._waiting))
        core.step()  # the last answers are kept
        return list(self.asked.values())

    def _end(self, name: str, how: str) -> None:
        self.asked[name].ended = how
        self._waiting.discard(name)

    def _send(self) -> None:
        rng = self.rng
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        ids = self._text(rng.integers(1, 40))
        for i in rng.permutation(len(self._documents))[: rng.integers(1, 4)]:
            ids += self._documents[i] + self._text(rng.integers(0, 6))
        words = {"mode": "off"} if kind == "dense" else {"agent": f"agent {rng.integers(5)}"}
        tenant = f"tenant {rng.integers(2)}" if kind == "tenant" else ""
        asked = Asked(kind, ids, int(rng.integers(2, 120)))
        name = self.engine.send(ids, tenant=tenant, words=words, new=asked.new, logprobs=1)
        self.asked[name] = asked
        self._waiting.add(name)
        if rng.random() < 0.02:  # the world moves on
            self._documents[rng.integers(len(self._documents))] = self._text(rng.integers(60, 220))

    def _text(self, tokens: int | np.integer[Any]) -> list[int]:
        ids: list[int] = self.rng.integers(3, self.engine.vocabulary, int(tokens)).tolist()
        return ids


def _note(asked: Asked, output: Any) -> None:
    """What is needed of vLLM's record, which is large."""
    said = output.outputs[0]
    asked.answer = tuple(said.token_ids)
    asked.logprobs = tuple(at[token].logprob for token, at in zip(said.token_ids, said.logprobs, strict=True))
    asked.report = reported(output.kv_transfer_params)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm bench soak`."""
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="(default: 2000)")
    parser.add_argument(
        "--model", default="random:256x4x4x2", metavar="SPEC", help="random:<hidden>x<layers>x<heads>x<kv_heads>, float32"
    )
    parser.add_argument("--seed", type=int, default=0)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the soak and returns its JSON document. Raises InputError for flags that cannot be used, or without vLLM."""
    if args.requests < LEAST:
        raise InputError(f"--requests is {args.requests}; it must be at least {LEAST}")
    need_vllm()
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(args.model, torch.float32).model
        with torch.no_grad():
            for weight in (w for w in model.parameters() if w.dim() > 1):
                weight.mul_(4.0)  # so that answers depend on everything in the cache
        model.save_pretrained(folder)
        config: Any = model.config
        store_bytes = STORE_TOKENS * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as alone:
            given = (folder, store_bytes, args.requests, args.seed, args.quiet)
            try:
                ours, plain = (alone.submit(_soaked, share, *given).result() for share in (True, False))
            except BrokenProcessPool as error:
                raise KVCommError("a process of the soak was killed; is there enough memory?") from error
    asked = ours.asked
    ended = Counter(str(a.ended) for a in asked)
    worst = max(distance(a, b) for a, b in zip(asked, plain.asked, strict=True) if a.kind == "dense")
    reports = [a.report for a in asked if a.kind == "reused"]
    parts = [reports[i * len(reports) // 20 : (i + 1) * len(reports) // 20] for i in range(20)]
    early, late = (reuse(reports[int(a * len(reports)) : int(b * len(reports))]) for a, b in ((0.05, 0.25), (0.25, 1.0)))
    grown, grown_plain = (None if None in x else x[1] - x[0] for x in (ours.resident_bytes, plain.resident_bytes))  # type: ignore[operator]
    checks = {
        "every_request_ended_well": ended["length"] + ended["cancelled"] == args.requests,
        "requests_were_preempted": ours.preemptions > 0,
        "requests_were_cancelled": ended["cancelled"] > 0,
        "dense_answers_are_those_without_kvcomm": worst < SAME,
        "reuse_does_not_decay": late > 0.9 * early,
        "memory_is_bounded": grown is None or grown_plain is None or grown < grown_plain + store_bytes,
    }
    return document(
        "kvcomm.bench.soak/1",
        vllm_version=ours.version,
        model=args.model,
        requests=args.requests,
        seed=args.seed,
        kinds=Counter(a.kind for a in asked),
        ended=ended,
        preemptions=ours.preemptions,
        faults=ours.faults,
        dense_worst_logprob_difference=worst,
        reuse_by_twentieth=[reuse(part) for part in parts],
        reuse_early=early,
        reuse_late=late,
        store_bytes=store_bytes,
        resident_bytes=ours.resident_bytes,
        resident_bytes_without_kvcomm=plain.resident_bytes,
        checks=checks,
    )


def _soaked(share: bool, folder: str, store_bytes: int, requests: int, seed: int, quiet: bool) -> Soaked:
    """In a process of its own."""
    extra = {"store_bytes": store_bytes, "least_gain": 32}
    engine = LocalEngine.start(
        folder, dtype="float32", share=share, extra=extra, quiet=quiet, disable_log_stats=False, **LIMITS
    )
    engine.ask([3, 4, 5], new=2)  # from now on it is ready
    soak, half = Soak(engine, requests, seed), list[int | None]()
    with tqdm(total=requests, desc="shared" if share else "without kvcomm", disable=quiet, leave=False) as bar:

        def tick(ended: int) -> None:
            bar.update(ended)
            if not half and len(soak.asked) >= requests // 2:
                half.append(_resident_bytes())

        asked = soak.run(tick)
    preemptions, faults = engine.counted("vllm:num_preemptions"), engine.counted("kvcomm:faults")
    done = Soaked(asked, (half[0], _resident_bytes()), preemptions, faults, engine.version)
    engine.close()
    return done


def distance(ours: Asked, others: Asked) -> float:
    """How far two engines' answers to a request are from each other: the largest difference of the log-probabilities of what
    they say, up to and with the first token that differs; where that is a tie, both think as much of theirs. Infinite where
    one answer is shorter.
    """
    worst = 0.0
    for a, b, x, y in zip(ours.answer, others.answer, ours.logprobs, others.logprobs, strict=False):
        worst = max(worst, abs(x - y))
        if a != b:
            return worst
    return worst if len(ours.answer) == len(others.answer) else float("inf")


def reuse(reports: Sequence[ReuseReport | None]) -> float:
    """Share of prompt tokens not prefilled."""
    known = [report for report in reports if report is not None]
    return sum(r.reused_tokens for r in known) / max(sum(r.prompt_tokens for r in known), 1)


def _resident_bytes() -> int | None:
    """Of this process; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def run(args: argparse.Namespace) -> int:
    doc = measure(args)
    if args.format == "json":
        print(dumps(doc))
    else:
        print(f"vLLM {doc['vllm_version']}, {doc['requests']} requests: {doc['ended']}, {doc['preemptions']} preemptions")
        print(f"reuse {doc['reuse_early']:.3f} in the first quarter, {doc['reuse_late']:.3f} later; faults {doc['faults']}")
        print(f"dense answers are {doc['dense_worst_logprob_difference']:.2g} from those without kvcomm (log-probability)")
        print("\n".join(f"{'ok' if good else 'NO':>4}  {name.replace('_', ' ')}" for name, good in doc["checks"].items()))
    if args.output:
        write_json(args.output / "soak.json", doc)
    return 0 if all(doc["checks"].values()) else 1
