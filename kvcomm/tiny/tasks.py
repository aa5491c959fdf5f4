"""Tasks whose answers depend on context across segments: what the embedded model is trained on and judged by.

A *world* is a set of facts spread over documents. Facts are bound in four ways, always scored apart:

    self      "city of erin is rome ."                                        says everything itself
    header    "report about bob : city is oslo ."                             the header in front names the owner
    other     "... next report about jack ." + "report : city is lima ."      the end of ANOTHER segment names the owner
    two-hop   "city of boss of bob ?"                                         one fact leads to the other

An agent gets a role (with the style its answers must have), documents, what other agents said, and questions. Some questions
define a memo ("note b : city of bob ?"), some build on a memo of an earlier agent ("note b ?", "total c : total b plus ...").
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvcomm.tiny.words import ADJECTIVES, ADVERBS, NOUNS, STEPS, VERBS, Domain

__all__ = [
    "BINDINGS",
    "CLOSING",
    "Binding",
    "Item",
    "World",
    "ask",
    "make_world",
    "recall",
    "role_text",
    "say",
    "score",
    "user_text",
]

Binding = Literal["self", "header", "other", "two-hop", "output"]
BINDINGS: tuple[Binding, ...] = ("self", "header", "other", "two-hop", "output")
"""`output` is a fact that only another agent's answer holds."""

CLOSING = "now write the final answer in the style of your role only ."


@dataclass(frozen=True)
class Item:
    """One question and the only right answer to it, in the style asked for."""

    question: str
    answer: str
    binding: Binding


@dataclass
class World:
    """Facts and the documents that state them."""

    domain: Domain
    facts: dict[tuple[str, str], str] = field(default_factory=dict)  # (owner, attribute) -> value
    binding: dict[tuple[str, str], Binding] = field(default_factory=dict)
    bundles: list[list[str]] = field(default_factory=list)  # documents; those of one bundle only make sense in this order
    memos: dict[str, str] = field(default_factory=dict)  # step -> value, as earlier agents stated it
    asked: set[tuple[str, str]] = field(default_factory=set)  # facts that an answer has stated already

    def documents(self, rng: random.Random | None = None) -> list[str]:
        """All documents; with `rng` in a new order that keeps bundles together."""
        bundles = list(self.bundles)
        if rng is not None:
            rng.shuffle(bundles)
        return [text for bundle in bundles for text in bundle]

    @property
    def exhausted(self) -> bool:
        """Whether answers have stated every fact."""
        return self.asked.issuperset(self.facts)


def filler(rng: random.Random) -> str:
    return f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} {rng.choice(ADVERBS)} ."


def make_world(
    rng: random.Random,
    domain: Domain,
    n_docs: int,
    *,
    facts: tuple[int, int] = (2, 4),
    fillers: tuple[int, int] = (0, 2),
    other: float = 0.3,
    explicit: float = 0.3,
) -> World:
    """A world of `n_docs` documents, one owner each.

    `facts` and `fillers` are per document; `other` is the share of documents whose owner only the document before them names,
    `explicit` the share of documents that also state a self-contained fact about somebody who has no document.
    """
    world = World(domain)
    names = rng.sample(domain.owners, min(len(domain.owners), n_docs + 6))
    owners, extras = names[:n_docs], names[n_docs:]
    attributes = [*domain.values, domain.link]
    # attributes that all documents have in common: then only the owner tells facts apart
    common = rng.sample(attributes, rng.randint(*facts)) if rng.random() < 0.5 else None
    anonymous = [i > 0 and rng.random() < other for i in range(n_docs)]
    for i, owner in enumerate(owners):
        sentences = []
        for attribute in common or rng.sample(attributes, rng.randint(*facts)):
            if attribute == domain.link and n_docs < 2:
                continue
            value = rng.choice([o for o in owners if o != owner] if attribute == domain.link else domain.values[attribute])
            world.facts[owner, attribute] = value
            world.binding[owner, attribute] = "other" if anonymous[i] else "header"
            sentences.append(f"{attribute} is {value} .")
        if extras and rng.random() < explicit:
            who, attribute = rng.choice(extras), rng.choice(list(domain.values))
            if (who, attribute) not in world.facts:
                world.facts[who, attribute] = rng.choice(domain.values[attribute])
                world.binding[who, attribute] = "self"
                sentences.append(f"{attribute} of {who} is {world.facts[who, attribute]} .")
        sentences += [filler(rng) for _ in range(rng.randint(*fillers))]
        rng.shuffle(sentences)
        header = f"{domain.document} :" if anonymous[i] else f"{domain.document} about {owner} :"
        if i + 1 < n_docs and anonymous[i + 1]:
            sentences.append(f"next {domain.document} about {owners[i + 1]} .")
        text = " ".join([header, *sentences])
        if anonymous[i]:
            world.bundles[-1].append(text)
        else:
            world.bundles.append([text])
    return world


def styled(value: str, style: str) -> str:
    """The form that a role's style gives a value."""
    return value.upper() if style == "loud" else value


def lookups(world: World, *, fresh: bool = False) -> dict[Binding, list[tuple[str, str]]]:
    """What can be asked, by binding: (owner, attribute), for two-hop the owner whose link is followed. With `fresh` only what
    no answer has stated yet.
    """
    link, known = world.domain.link, world.asked if fresh else set()
    out: dict[Binding, list[tuple[str, str]]] = {}
    for (owner, attribute), value in world.facts.items():
        if (owner, attribute) not in known:
            out.setdefault(world.binding[owner, attribute], []).append((owner, attribute))
        if attribute == link:
            hops = [(owner, a) for o, a in world.facts if o == value and a != link and (o, a) not in known]
            out.setdefault("two-hop", []).extend(hops)
    return out


def ask(
    rng: random.Random,
    world: World,
    style: str,
    *,
    step: str = "",
    binding: Binding | None = None,
    two_hop: float = 0.2,
    fresh: bool = False,
) -> Item:
    """A question about a random fact. With `step`, its answer defines that memo (in `math`: adds to the total so far). With
    `fresh`, about one that no answer has stated yet, as long as there is one.
    """
    found = lookups(world, fresh=fresh)
    found = found if any(b != "two-hop" for b in found) else lookups(world)
    if step and world.domain.arithmetic:  # totals are of numbers; a world without any gets a plain question
        numbers = {b: kept for b, keys in found.items() if (kept := [k for k in keys if k[1] != world.domain.link])}
        found, step = (numbers, step) if numbers else (found, "")
    direct = [b for b in found if b != "two-hop"]
    if binding is None or not found.get(binding):
        wanted = "two-hop" in found and rng.random() < two_hop
        drawn: Binding = "two-hop" if wanted and found["two-hop"] else rng.choice(direct)
        binding = drawn
    owner, attribute = rng.choice(found[binding])
    world.asked.add((owner, attribute))
    if binding == "two-hop":
        link, hop = world.domain.link, world.facts[owner, world.domain.link]
        world.asked |= {(owner, link), (hop, attribute)}
        asked, path, value = (
            f"{attribute} of {link} of {owner}",
            f"{link} of {owner} is {hop} and ",
            world.facts[hop, attribute],
        )
        stated = f"{path}{attribute} of {hop} is"
    else:
        asked, value = f"{attribute} of {owner}", world.facts[owner, attribute]
        stated = f"{asked} is"
    memo, shown = world.domain.memo, value if attribute == world.domain.link else styled(value, style)  # names keep their form
    if not step:
        return Item(f"{asked} ?", f"{stated} {shown} .", binding)
    if not (world.domain.arithmetic and world.memos):
        world.memos[step] = value
        return Item(f"{memo} {step} : {asked} ?", f"{stated} {shown} so {memo} {step} is {value} .", binding)
    before, total = list(world.memos.items())[-1]
    minus = int(total) >= int(value) and (rng.random() < 0.5 or int(total) + int(value) > 20)
    result = int(total) - int(value) if minus else int(total) + int(value)
    sign = "minus" if minus else "plus"
    world.memos[step] = str(result)
    return Item(
        f"{memo} {step} : {memo} {before} {sign} {asked} ?",
        f"{memo} {before} is {total} {sign} {stated} {shown} so {memo} {step} is {result} .",
        binding,
    )


def recall(rng: random.Random, world: World, style: str) -> Item:
    """A question about a memo that an earlier agent stated."""
    step = rng.choice(list(world.memos))
    memo, value = world.domain.memo, world.memos[step]
    shown = value if value in world.domain.owners else styled(value, style)
    return Item(f"{memo} {step} ?", f"{memo} {step} is {shown} .", "output")


def next_step(world: World) -> str:
    """The memo that the next agent defines, or '' when all are taken."""
    return STEPS[len(world.memos)] if len(world.memos) < len(STEPS) else ""


def role_text(role: str, style: str) -> str:
    return f"you are the {role} , a careful agent of the team . your style is {style} . use only what is said below ."


def say(role: str, answer: str) -> str:
    """How one agent's answer stands in the prompts of the others."""
    return f"{role} says : {answer}"


def user_text(documents: Iterable[str], said: Iterable[str], items: Sequence[Item]) -> str:
    """Documents, then what others said, then this agent's questions and the closing text."""
    return " ".join([*documents, *said, "questions :", *(item.question for item in items), CLOSING])


def answer_text(items: Sequence[Item]) -> str:
    return " ".join(item.answer for item in items)


def score(items: Sequence[Item], answer: str) -> list[bool]:
    """Which items `answer` gets right: its i-th sentence must be the right one, word for word."""
    sentences = [s.strip() for s in answer.split(" .")]
    return [i < len(sentences) and f"{sentences[i]} ." == item.answer for i, item in enumerate(items)]
