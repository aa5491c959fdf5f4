"""Runs the same requests through every arm and records each call.

An arm is one engine with its own store on the one model: `dense` reuses nothing, `prefix_cache` exact prefixes only, `shared`
is kvcomm, `rotate` moves keys without repairing anything. `processes` is another thing (see `on_processes`). The order of the
arms changes from request to request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvcomm.agents.team import Generator, Team, Turn
from kvcomm.backends.base import Backend
from kvcomm.config import Config
from kvcomm.demo.prefills import Passage, Reader
from kvcomm.demo.workloads import Task
from kvcomm.engine import KVComm, Output, Rule
from kvcomm.replay.recording.recorder import Recorder
from kvcomm.segments import ReuseReport
from kvcomm.tiny import tasks

__all__ = ["ARMS", "STORE_BYTES", "Arm", "Call", "arms", "run"]

STORE_BYTES = 1 << 29  # per arm: more than the requests that text is shared within
ARMS = ("dense", "prefix_cache", "shared", "rotate", "processes")
RECORDED = "dense"  # its answers are the model's own, whatever is measured on them later


@dataclass(frozen=True)
class Call:
    """One agent's call in one arm."""

    workload: str
    request: int
    arm: str
    round: int  # from 1
    position: int  # of the agent, from 1, as they speak within a round
    agent: str
    text: str
    right: tuple[bool, ...]  # per question
    bindings: tuple[str, ...]  # per question
    report: ReuseReport
    passages: tuple[Passage, ...] = ()  # the request's documents in its prompt, where they are counted


class Arm:
    """A generator for `Team.run` that imposes the arm's rule on every agent."""

    def __init__(self, comm: KVComm, rule: Rule | None = None) -> None:
        self.comm, self.rule = comm, rule

    def generate(
        self, messages: Sequence[Mapping[str, str]], *, agent: str, rule: Rule, max_new_tokens: int, **options: Any
    ) -> Output:
        return self.comm.generate(
            messages, agent=agent, rule=self.rule or rule, max_new_tokens=max_new_tokens, do_sample=False, **options
        )


def arms(backend: Backend) -> dict[str, Arm]:
    """Fresh engines, one per arm."""
    return {
        "dense": Arm(KVComm(backend, config=Config(mode="off"))),
        "prefix_cache": Arm(KVComm(backend, config=Config(store_bytes=STORE_BYTES)), "exact"),
        "shared": Arm(KVComm(backend, config=Config(store_bytes=STORE_BYTES))),
        "rotate": Arm(KVComm(backend, config=Config(rung="rotate", max_recompute=1.0, store_bytes=STORE_BYTES))),
    }


def run(
    generators: Mapping[str, Generator],
    teams: Mapping[str, Team],
    requests: Sequence[Task],
    *,
    seed: int,
    tick: Callable[[], object] = lambda: None,
    record: Recorder | None = None,
    reader: Reader | None = None,
) -> list[Call]:
    """Every request through every arm, `tick` called after each. Answers flow: an agent reads what the others really said.

    What the arm RECORDED is asked and answers goes to `record`, a session for each request. `reader` counts documents.
    """
    rng = random.Random(seed)
    calls: list[Call] = []
    for number, task in enumerate(requests):
        order = list(generators)
        rng.shuffle(order)
        for name in order:
            team = replace(teams[task.workload], record=record if name == RECORDED else None)
            done = team.run(generators[name], task.fields, session=f"{task.workload}-{seed}-{number}")
            speakers = list(dict.fromkeys(turn.agent for turn in done.turns))
            calls += [_call(task, number, name, speakers.index(turn.agent) + 1, turn, reader) for turn in done.turns]
            tick()
    return calls


def _call(task: Task, request: int, arm: str, position: int, turn: Turn, reader: Reader | None) -> Call:
    items = task.items[turn.agent]
    right = tuple(tasks.score(items, turn.output.text))
    bindings = tuple(item.binding for item in items)
    report = turn.output.report
    return Call(
        workload=task.workload,
        request=request,
        arm=arm,
        round=turn.round,
        position=position,
        agent=turn.agent,
        text=turn.output.text,
        right=right,
        bindings=bindings,
        report=report,
        passages=() if reader is None else reader.passages(turn.messages, task.bundles, report),
    )
