"""Training data of the embedded model: team prompts, warm-up lists and running totals as token ids, weights and labels.

Everything is drawn from a seed and a step number. Knows nothing of models.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvcomm.tiny import tasks
from kvcomm.tiny.words import DOMAINS, ROLES, STYLES

__all__ = ["NOTHING", "Encoder", "Stage", "batch", "bindings", "team_sequence"]

CONTEXT_WEIGHT = 0.02  # loss weight of text that is not an answer
TOKENS_PER_STEP = 4096
NOTHING = -100  # a label that no loss counts
FILLER_TOKENS = 6
ATTRIBUTES = {attribute for domain in DOMAINS.values() for attribute in (*domain.values, domain.link)}
ENDS = {".", "and", "so", "plus", "minus"}


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum, until `until` tokens were seen."""

    until: float  # million tokens
    lengths: tuple[int, ...]  # tokens of a training sequence, step by step in turn
    warm: float = 0.0  # share of repeat-and-re-ask sequences
    sums: float = 0.1  # share of sequences of running totals alone
    facts: tuple[int, int] = (1, 4)
    fillers: int = 3  # most filler sentences of a document
    other: float = 0.3
    two_hop: float = 0.2
    memos: float = 0.25  # share of questions that define or use a memo
    styles: tuple[str, ...] = STYLES
    items: tuple[int, int] = (2, 6)  # questions of one turn
    said: int = 2  # other agents heard, at most

    def length(self, step: int) -> int:
        return self.lengths[step % len(self.lengths)]

    def rows(self, step: int) -> int:
        """Sequences of a step."""
        return max(2, TOKENS_PER_STEP // self.length(step))


class Encoder:
    """Words to ids without the tokenizer's overhead; the tests check that both agree."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids: dict[str, int] = {
            w.removeprefix("Ġ"): i for w, i in tokenizer.get_vocab().items() if w[0] in "Ġ<" and len(w) > 1
        }

    def __call__(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]


class Sequence:
    """Token ids and loss weights under construction."""

    def __init__(self, encode: Encoder) -> None:
        self.encode = encode
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.owners: list[int] = []
        self.attributes: list[int] = []

    def add(self, text: str, weight: float) -> None:
        new = self.encode(text)
        self.ids += new
        self.weights += [weight] * len(new)
        for owner, attribute in bindings(text.split()):
            self.owners.append(self.encode.ids[owner] if owner else NOTHING)
            self.attributes.append(self.encode.ids[attribute] if attribute else NOTHING)

    def cut(self, length: int, pad: int) -> tuple[Tensor, ...]:
        """Ids, loss weights, and the ids of the owner and attribute whose value a token belongs to; each [length]."""
        columns = ((self.ids, pad), (self.weights, 0.0), (self.owners, NOTHING), (self.attributes, NOTHING))
        return tuple(torch.tensor([*column, *[empty] * (length - len(column))][:length]) for column, empty in columns)


def bindings(words: list[str]) -> list[tuple[str, str]]:
    """For every word the (owner, attribute) whose value it belongs to, or ('', '')."""
    out, owner, inside = [], "", ("", "")
    for i, word in enumerate(words):
        if word in ENDS:
            inside = ("", "")
        out.append(inside)
        if word == "about":
            owner = words[i + 1]
        elif word == "is" and i > 2 and words[i - 2] == "of" and words[i - 3] in ATTRIBUTES:
            inside = (words[i - 1], words[i - 3])
        elif word == "is" and i > 0 and words[i - 1] in ATTRIBUTES:
            inside = (owner, words[i - 1])
    return out


def questions(rng: random.Random, world: tasks.World, style: str, stage: Stage, n: int) -> list[tasks.Item]:
    items = []
    for _ in range(n):
        step = tasks.next_step(world)
        if rng.random() < stage.memos and (step or world.memos):
            if world.memos and (not step or rng.random() < 0.4):
                items.append(tasks.recall(rng, world, style))
            else:
                items.append(tasks.ask(rng, world, style, step=step, two_hop=stage.two_hop, fresh=True))
        else:
            items.append(tasks.ask(rng, world, style, two_hop=stage.two_hop, fresh=True))
    return items


def team_sequence(rng: random.Random, stage: Stage, length: int, encode: Encoder) -> Sequence:
    """One agent's prompt with its answer, then questions about what was not asked yet until the sequence is full."""
    out, domain = Sequence(encode), rng.choice(list(DOMAINS.values()))
    room = 0.6 * length  # for documents
    longest = int(min(stage.fillers, (room / 3 - 20) / FILLER_TOKENS) * rng.random() + 0.5)
    fillers = (rng.randint(0, longest), longest)
    per_doc = 7 + 5 * sum(stage.facts) / 2 + FILLER_TOKENS * sum(fillers) / 2
    most = max(2, min(24, int(room / per_doc)))
    style = rng.choice(stage.styles)
    world = tasks.make_world(
        rng, domain, rng.randint(max(2, most // 2), most), facts=stage.facts, fillers=fillers, other=stage.other
    )
    roles = rng.sample(ROLES, 5)
    said = []
    if stage.memos:
        for role in roles[: rng.randint(0, stage.said)]:
            said.append(
                tasks.say(role, tasks.answer_text(questions(rng, world, rng.choice(stage.styles), stage, rng.randint(1, 3))))
            )
    items = questions(rng, world, style, stage, rng.randint(*stage.items))
    out.add(f"<bos> <|system|> {tasks.role_text(roles[-1], style)} <|end|>", CONTEXT_WEIGHT)
    out.add(f"<|user|> {tasks.user_text(world.documents(), said, items)} <|end|> <|assistant|>", CONTEXT_WEIGHT)
    out.add(f"{tasks.answer_text(items)} <|end|>", 1.0)
    while len(out.ids) < length and not world.exhausted:
        items = questions(rng, world, style, stage, rng.randint(*stage.items))
        out.add(f"<|user|> {tasks.user_text([], [], items)} <|end|> <|assistant|>", CONTEXT_WEIGHT)
        out.add(f"{tasks.answer_text(items)} <|end|>", 1.0)
    return out


def sum_sequence(rng: random.Random, length: int, encode: Encoder) -> Sequence:
    """Running totals without documents: only the sums can be predicted, and only they count."""
    out, domain = Sequence(encode), DOMAINS["math"]
    out.add("<bos>", 0.0)
    while len(out.ids) < length:
        world = tasks.make_world(rng, domain, 2, facts=(4, 4), other=0.0)
        while step := tasks.next_step(world):
            stated, result = tasks.ask(rng, world, "plain", step=step).answer.removesuffix(" .").rsplit(" ", 1)
            out.add(stated, 0.0)
            out.add(result, 1.0)
            out.add(".", 0.0)
    return out


def warm_sequence(rng: random.Random, length: int, encode: Encoder) -> Sequence:
    """A list repeated word by word, or facts re-asked in random order: later copies are predictable by induction."""
    out = Sequence(encode)
    out.add("<bos>", 0.0)
    domain = rng.choice(list(DOMAINS.values()))
    if rng.random() < 0.4:
        words = [rng.choice(rng.choice([*domain.values.values(), domain.owners])) for _ in range(rng.randint(8, length // 4))]
        out.add(" ".join(words), 0.0)
        while len(out.ids) < length:
            out.add(words[0], 0.0)
            out.add(" ".join(words[1:]), 1.0)
        return out
    attributes = rng.sample(list(domain.values), rng.choice((1, 1, 3)))
    facts = [(o, a) for o in rng.sample(domain.owners, rng.randint(3, 8)) for a in attributes]
    rng.shuffle(facts)
    values = {f: rng.choice(domain.values[f[1]]) for f in facts[:10]}
    out.add(" ".join(f"{a} of {o} is {v} ." for (o, a), v in values.items()), CONTEXT_WEIGHT)
    while len(out.ids) < length:
        owner, attribute = rng.choice(list(values))
        out.add(f"{attribute} of {owner} is", CONTEXT_WEIGHT)
        out.add(values[owner, attribute], 1.0)
        out.add(".", 0.1)
    return out


def batch(seed: int, step: int, stage: Stage, encode: Encoder, pad: int) -> tuple[Tensor, ...]:
    """The training data of one step, what `Sequence.cut` gives as [sequences, length + 1] each: a function of seed and step
    only, so that a resumed run continues.
    """
    rng, length = random.Random(seed * 1_000_003 + step), stage.length(step)
    rows = []
    for _ in range(stage.rows(step)):
        kind = rng.random()
        if kind < stage.warm:
            made = warm_sequence(rng, length, encode)
        elif kind < stage.warm + stage.sums:
            made = sum_sequence(rng, length, encode)
        else:
            made = team_sequence(rng, stage, length, encode)
        rows.append(made.cut(length + 1, pad))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))
