"""The tasks against a reader of their documents that is written differently: every answer follows from the text alone."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest

from kvcomm.tiny import tasks
from kvcomm.tiny.words import DOMAINS, STYLES, Domain

SEEDS = range(40)


def read(domain: Domain, documents: list[str]) -> dict[tuple[str, str], str]:
    """Facts as a person reads them: sentence by sentence, remembering whom the document is about."""
    facts, about, announced = {}, "", ""
    for document in documents:
        head, body = document.split(" :", 1)
        about = head.split(" about ")[1] if " about " in head else announced
        for sentence in (s.strip() for s in body.split(" .")):
            if found := re.fullmatch(rf"next {domain.document} about (\S+)", sentence):
                announced = found[1]
            elif found := re.fullmatch(r"(\S+) of (\S+) is (.+)", sentence):
                facts[found[2], found[1]] = found[3]
            elif found := re.fullmatch(r"(\S+) is (.+)", sentence):
                facts[about, found[1]] = found[2]
    return facts


@pytest.mark.parametrize("name", DOMAINS)
def test_documents_say_what_the_world_holds(name: str) -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        world = tasks.make_world(rng, DOMAINS[name], rng.randint(2, 12))
        for documents in (world.documents(), world.documents(rng)):
            assert read(DOMAINS[name], documents) == world.facts


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", DOMAINS)
def test_answers_follow_from_the_documents(name: str, style: str) -> None:
    forms: dict[str, Callable[[str], str]] = {"plain": str, "loud": str.upper}
    form = forms[style]
    for seed in SEEDS:
        rng = random.Random(seed)
        world = tasks.make_world(rng, DOMAINS[name], 6)
        facts, link = read(DOMAINS[name], world.documents(rng)), DOMAINS[name].link
        for binding in tasks.BINDINGS[:4]:
            item = tasks.ask(rng, world, style, binding=binding)
            if item.binding == "two-hop":
                attribute, owner = re.fullmatch(rf"(\S+) of {link} of (\S+) \?", item.question).groups()  # type: ignore[union-attr]  # no match fails
                hop = facts[owner, link]
                assert item.answer == f"{link} of {owner} is {hop} and {attribute} of {hop} is {form(facts[hop, attribute])} ."
            else:
                attribute, owner = re.fullmatch(r"(\S+) of (\S+) \?", item.question).groups()  # type: ignore[union-attr]  # no match fails
                value = facts[owner, attribute]
                assert item.answer == f"{attribute} of {owner} is {value if attribute == link else form(value)} ."


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None
    return int(found[1])


def test_totals_add_up() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        world = tasks.make_world(rng, DOMAINS["math"], 6)
        totals: list[int] = []
        while step := tasks.next_step(world):
            item = tasks.ask(rng, world, "plain", step=step)
            value, total = number(r"of \S+ is (\d+) so", item.answer), number(r"is (\d+) \.$", item.answer)
            if totals:
                sign = 1 if " plus " in item.question else -1
                assert total == totals[-1] + sign * value
                assert 0 <= total <= 20
            else:
                assert total == value
            totals.append(total)
            assert tasks.recall(random.Random(0), world, "plain").binding == "output"
        assert len(totals) == 5


def test_every_binding_occurs_in_every_workload() -> None:
    for domain in DOMAINS.values():
        seen = {b for seed in SEEDS for b in tasks.make_world(random.Random(seed), domain, 8).binding.values()}
        assert seen == {"self", "header", "other"}


def test_score() -> None:
    items = [
        tasks.Item("city of bob ?", "city of bob is oslo .", "header"),
        tasks.Item("pet of bob ?", "pet of bob is dog .", "header"),
    ]
    assert tasks.score(items, "city of bob is oslo . pet of bob is dog .") == [True, True]
    assert tasks.score(items, "city of bob is rome . pet of bob is dog .") == [False, True]
    assert tasks.score(items, "city of bob is oslo . pet of bob is") == [True, False]
    assert tasks.score(items, "") == [False, False]
