"""The demo's three teams and the requests they get: retrieval, math and code, shaped like the paper's workloads.

Every agent reads all documents, in the order its own retrieval gave them, and what the agents before it said; it answers three
questions of its own. Later questions build on earlier agents' answers.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter

from kvcomm.agents.agent import SAID, Agent
from kvcomm.agents.team import Team
from kvcomm.agents.topology import full
from kvcomm.errors import TeamError
from kvcomm.tiny import tasks
from kvcomm.tiny.words import DOMAINS, STYLES

__all__ = ["ROLES", "Task", "default_team", "make_task", "own_questions", "style_of"]

ROLES: Mapping[str, tuple[str, ...]] = {
    "retrieval": ("scout", "analyst", "writer", "critic", "judge"),
    "math": ("teacher", "worker", "clerk", "auditor", "judge"),
    "code": ("planner", "coder", "tester", "critic", "reviewer"),
}
SPARE = ("editor", "lawyer", "doctor")
FILLERS = (2, 8)  # sentences per document that state nothing
CLASSES: tuple[tasks.Binding, ...] = ("self", "header", "other", "two-hop")
FIXED = frozenset({"documents", "input", "question", "questions", SAID})  # slots that mean the same whatever agents are called


@dataclass(frozen=True)
class Task:
    """One request to a team: the fields of its prompts, and what each agent is asked."""

    workload: str
    fields: dict[str, str]
    items: dict[str, tuple[tasks.Item, ...]]  # by agent; none where its prompt has no questions
    bundles: tuple[str, ...]  # the documents; those that only make sense together are one text


def style_of(role: str) -> str:
    """The style that a role prompt asks for; plain where it names none."""
    return next((s for s in STYLES if f"style is {s} " in role), "plain")


def default_team(workload: str, agents: int) -> Team:
    """A fully connected team; the styles take turns. Eight agents at most: every word of a role is one the model knows."""
    names = (*ROLES[workload], *SPARE)[:agents]
    styles = [STYLES[(i + (workload == "code") * 2) % len(STYLES)] for i in range(len(names))]
    return Team(
        tuple(
            Agent(
                name=name,
                role=tasks.role_text(name, style),
                template=f"{{documents_{i}}} {{said}} questions : {{questions_{i}}} {tasks.CLOSING}",
                max_new_tokens=96,
            )
            for i, (name, style) in enumerate(zip(names, styles, strict=True), 1)
        ),
        full(names),
    )


def own_questions(team: Team) -> Team:
    """The team, and every agent's slot `{questions}`, `{question}` or `{<its name>}` is `{questions_<i>}`, its own ones.

    Raises TeamError where an agent is shown another one's questions: its answers are scored on its own.
    """
    numbers = {agent.name: i for i, agent in enumerate(team.agents, 1)}
    owners = {name: i for name, i in numbers.items() if name not in FIXED} | {f"questions_{i}": i for i in numbers.values()}
    agents = []
    for i, agent in enumerate(team.agents, 1):
        for slot in sorted(agent.slots):
            if (owner := owners.get(slot, i)) != i:
                raise TeamError(
                    f"agent {agent.name!r} is shown {{{slot}}}, which are agent {owner}'s questions, and scored on its own; "
                    "write {questions} for an agent's own"
                )
        template = _renamed(agent.template, ("questions", "question", *owners), f"questions_{i}")
        agents.append(replace(agent, template=template))
    return replace(team, agents=tuple(agents))


def _renamed(template: str, slots: Collection[str], name: str) -> str:
    """The template with all of these slots called `name`."""
    out = ""
    for literal, slot, _, _ in Formatter().parse(template):
        out += literal.replace("{", "{{").replace("}", "}}")
        out += "" if slot is None else f"{{{name if slot in slots else slot}}}"
    return out


def make_task(
    rng: random.Random, workload: str, agents: Sequence[Agent], documents: int, fillers: tuple[int, int] = FILLERS
) -> Task:
    """A fresh world and three questions for every agent that has a slot for its own, their bindings taking turns.

    Fields: `documents_<i>` and `questions_<i>` of the i-th agent; `documents` and `input` are `documents_1`.
    """
    world = tasks.make_world(rng, DOMAINS[workload], documents, fillers=fillers, explicit=0.4)
    fields: dict[str, str] = {}
    items: dict[str, tuple[tasks.Item, ...]] = {}
    turn = rng.randrange(len(CLASSES))
    for i, agent in enumerate(agents, 1):
        asked = _questions(rng, world, style_of(agent.role), turn) if f"questions_{i}" in agent.slots else ()
        turn += 2 + (i % 2)
        items[agent.name] = asked
        fields[f"documents_{i}"] = " ".join(world.documents(rng if i > 1 else None))
        fields[f"questions_{i}"] = " ".join(item.question for item in asked)
    fields["documents"] = fields["input"] = fields["documents_1"]
    return Task(workload, fields, items, tuple(" ".join(bundle) for bundle in world.bundles))


def _questions(rng: random.Random, world: tasks.World, style: str, turn: int) -> tuple[tasks.Item, ...]:
    """About a fact, about what an earlier agent stated if there is something, and one whose answer states something new."""
    first = tasks.ask(rng, world, style, binding=CLASSES[turn % len(CLASSES)])
    if world.memos:
        second = tasks.recall(rng, world, style)
    else:
        second = tasks.ask(rng, world, style, binding=CLASSES[(turn + 2) % len(CLASSES)])
    third = tasks.ask(rng, world, style, step=tasks.next_step(world), binding=CLASSES[(turn + 1) % len(CLASSES)])
    return first, second, third
