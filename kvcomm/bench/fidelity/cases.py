"""Requests whose documents have a base KV from another context, with what a dense run does with them.

prompt   | role | header 1 | content 1 | header 2 | content 2 | ... | question, closing text |
isolated               [content: <bos> + content]                     a header is template text, computed anew
header      [header + content: <bos> + header + content]              the unit that a retrieval cache would keep
producer    [header + content: another agent's prompt, documents in another order]
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvcomm.backends.hf import HFBackend
from kvcomm.plain import PlainKV
from kvcomm.segments import Ids, Segment, SegmentKV, Span
from kvcomm.tiny import tasks
from kvcomm.tiny.words import DOMAINS, ROLES, STYLES

__all__ = ["BASES", "Base", "Case", "Piece", "Template", "case", "templates"]

Base = Literal["isolated", "header", "producer"]
Bundle = list[tuple[int, int]]  # [start, end) of documents that only make sense together, in order
BASES: tuple[Base, ...] = ("isolated", "header", "producer")


@dataclass(frozen=True)
class Template:
    """The fixed part of one agent's prompts."""

    name: str
    workload: str
    role: str
    style: str
    documents: int
    fillers: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Piece:
    """A reusable run of a prompt and its base KV."""

    slot: str
    span: Span
    base: SegmentKV

    def place(self, backend: HFBackend) -> PlainKV:
        """Its base in pre-RoPE space."""
        return backend.plain(self.base, self.span.offset, self.span.offset + self.span.tokens)


@dataclass(frozen=True, eq=False)
class Case:
    """One request: its prompt, the pieces that could be reused, and the dense run."""

    ids: Ids  # [tokens]
    exact: int  # leading tokens whose KV any exact prefix cache holds: the role
    pieces: tuple[Piece, ...]
    answer: Ids  # [answer tokens]
    binding: tasks.Binding
    kv: SegmentKV  # of the dense run
    logits: Tensor = field(repr=False)  # [answer tokens, vocabulary] of the dense run

    def prefix(self, backend: HFBackend) -> Span:
        """The exact prefix, which the dense run's KV serves."""
        segment = Segment(self.ids[: self.exact], self.ids[:0], backend.fingerprint)
        return Span(0, self.exact, "exact", segment, 0)

    @property
    def dense_right(self) -> bool:
        return bool(self.logits.argmax(-1).tolist() == self.answer.tolist())


def templates(count: int, documents: int, fillers: tuple[int, int], seed: int) -> list[Template]:
    """Templates of the three workloads in turn."""
    rng = random.Random(seed)
    roles = rng.sample(ROLES, count)
    return [
        Template(f"{name}/{role}", name, role, STYLES[i % len(STYLES)], documents, fillers)
        for i, role in enumerate(roles)
        for name in [list(DOMAINS)[i % len(DOMAINS)]]
    ]


def encode(backend: HFBackend, text: str) -> list[int]:
    tokenizer = backend.tokenizer
    assert tokenizer is not None
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


@torch.no_grad()
def dense(backend: HFBackend, ids: Ids, answer: Ids) -> tuple[SegmentKV, Tensor]:
    """KV of the prompt, and logits [answer tokens, vocabulary] of a forward over prompt and answer."""
    whole = torch.from_numpy(np.concatenate([ids, answer[:-1]]).astype(np.int64))[None]
    cache = backend.cache(whole.shape[1])
    with backend.hooked():
        logits = backend.model(input_ids=whole, past_key_values=cache, use_cache=True).logits[0]
    kv = backend.read(cache, 0, len(ids), whole.shape[1])
    backend.release(cache)
    return kv, logits[len(ids) - 1 :].clone()


def part(kv: SegmentKV, start: int, end: int) -> SegmentKV:
    """Tokens [start, end) of a KV, as views."""
    keys, values = (tuple(x[:, start:end] for x in xs) for xs in (kv.keys, kv.values))
    return SegmentKV(keys, values, kv.start + start, kv.length)


def case(backend: HFBackend, template: Template, base: Base, rng: random.Random, binding: tasks.Binding | None = None) -> Case:
    """A fresh request to `template`, about a fact bound by `binding` where there is one."""
    domain = DOMAINS[template.workload]
    world = tasks.make_world(rng, domain, template.documents, fillers=template.fillers, explicit=0.4)
    item = tasks.ask(rng, world, template.style, binding=binding)
    ids = role(backend, template.role, template.style)
    exact, where = len(ids), list[Bundle]()
    for bundle in rng.sample(world.bundles, len(world.bundles)):
        where.append([])
        for text in bundle:
            start = len(ids)
            ids += encode(backend, " " + text)
            where[-1].append((start, len(ids)))
    ids += encode(backend, f" questions : {item.question} {tasks.CLOSING}<|end|><|assistant|>")
    prompt, answer = np.asarray(ids, np.int32), np.asarray(encode(backend, " " + item.answer), np.int32)
    kv, logits = dense(backend, prompt, answer)
    make = _producer if base == "producer" else _alone
    return Case(prompt, exact, tuple(make(backend, template, base, rng, prompt, where)), answer, item.binding, kv, logits)


def role(backend: HFBackend, name: str, style: str) -> list[int]:
    """The fixed text in front of everything else."""
    return encode(backend, f"<bos><|system|> {tasks.role_text(name, style)}<|end|><|user|>")


def _alone(
    backend: HFBackend, template: Template, base: Base, rng: random.Random, prompt: Ids, where: list[Bundle]
) -> Iterator[Piece]:
    """Every document computed behind nothing but <bos>."""
    context, colon = np.asarray(encode(backend, "<bos>"), np.int32), encode(backend, " :")[0]
    for i, (start, end) in enumerate(document for bundle in where for document in bundle):
        header = int(np.flatnonzero(prompt[start:end] == colon)[0]) + 1 if base == "isolated" else 0
        ids = prompt[start + header : end]
        kv, _ = dense(backend, np.concatenate([context, ids]), ids[:1])
        span = Span(start + header, end, "rotate", Segment(ids, context, backend.fingerprint), 0)
        yield Piece(f"{template.name}/{i}", span, part(kv, 1, 1 + len(ids)))


def _producer(
    backend: HFBackend, template: Template, base: Base, rng: random.Random, prompt: Ids, where: list[Bundle]
) -> Iterator[Piece]:
    """Another agent read the same bundles in another order."""
    name = rng.choice([r for r in ROLES if r != template.role])
    ids, at = role(backend, name, rng.choice(STYLES)), {}
    for number in rng.sample(range(len(where)), len(where)):
        at[number] = len(ids)
        ids += prompt[where[number][0][0] : where[number][-1][1]].tolist()
    whole = np.asarray(ids, np.int32)
    kv, _ = dense(backend, whole, whole[:1])
    for number, bundle in enumerate(where):
        start, end, old = bundle[0][0], bundle[-1][1], at[number]
        segment = Segment(whole[old : old + end - start], whole[:old], backend.fingerprint, producer=name)
        span = Span(start, end, "rotate", segment, 0)
        yield Piece(f"{template.name}/{number}", span, part(kv, old, old + end - start))
