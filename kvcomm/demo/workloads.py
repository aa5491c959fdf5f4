"""The demo's three teams and the requests they get: retrieval, math and code, shaped like the paper's workloads.

Every agent reads all documents, in the order its own retrieval gave them, and what the agents before it said; it answers three
questions of its own. Later questions build on earlier agents' answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvcomm.agents.agent import Agent
from kvcomm.agents.team import Team
from kvcomm.agents.topology import full
from kvcomm.tiny import tasks
from kvcomm.tiny.words import DOMAINS, STYLES

__all__ = ["ROLES", "Task", "default_team", "make_task", "style_of"]

ROLES: Mapping[str, tuple[str, ...]] = {
    "retrieval": ("scout", "analyst", "writer", "critic", "judge"),
    "math": ("teacher", "worker", "clerk", "auditor", "judge"),
    "code": ("planner", "coder", "tester", "critic", "reviewer"),
}
SPARE = ("editor", "lawyer", "doctor")
FILLERS = (2, 8)  # sentences per document that state nothing
CLASSES: tuple[tasks.Binding, ...] = ("self", "header", "other", "two-hop")


@dataclass(frozen=True)
class Task:
    """One request to a team: the fields of its prompts, and what each agent is asked."""

    workload: str
    fields: dict[str, str]
    items: dict[str, tuple[tasks.Item, ...]]  # by agent
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


def make_task(
    rng: random.Random, workload: str, agents: Sequence[Agent], documents: int, fillers: tuple[int, int] = FILLERS
) -> Task:
    """A fresh world and three questions for every agent, their bindings taking turns.

    Fields: `documents` and `questions` (of the first agent), `documents_<i>` and `questions_<i>` of the i-th one.
    """
    world = tasks.make_world(rng, DOMAINS[workload], documents, fillers=fillers, explicit=0.4)
    fields: dict[str, str] = {}
    items: dict[str, tuple[tasks.Item, ...]] = {}
    turn = rng.randrange(len(CLASSES))
    for i, agent in enumerate(agents, 1):
        style = style_of(agent.role)
        asked = [tasks.ask(rng, world, style, binding=CLASSES[turn % len(CLASSES)])]
        asked.append(
            tasks.recall(rng, world, style)
            if world.memos
            else tasks.ask(rng, world, style, binding=CLASSES[(turn + 2) % len(CLASSES)])
        )
        asked.append(tasks.ask(rng, world, style, step=tasks.next_step(world), binding=CLASSES[(turn + 1) % len(CLASSES)]))
        turn += 2 + (i % 2)
        items[agent.name] = tuple(asked)
        fields[f"documents_{i}"] = " ".join(world.documents(rng if i > 1 else None))
        fields[f"questions_{i}"] = " ".join(item.question for item in asked)
    fields["documents"] = fields["input"] = fields["documents_1"]
    fields["questions"] = fields["questions_1"]
    return Task(workload, fields, items, tuple(" ".join(bundle) for bundle in world.bundles))
