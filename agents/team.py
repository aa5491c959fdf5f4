"""A team: agents and a topology, as data. Runs them on anything that generates, round by round and step by step.

Knows the text that agents exchange and nothing of caches. A generator with a true attribute `concurrent` gets the agents of one
step side by side, every other one gets them one after the other, in the same order every time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass, field, fields
from functools import partial
from html import escape
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import yaml

from kvcomm.agents.agent import SAID, Agent, Message
from kvcomm.agents.topology import KINDS, Topology
from kvcomm.errors import KVCommError, TeamError
from kvcomm.policy import Rule
from kvcomm.replay.recording.generator import Recorded
from kvcomm.replay.recording.recorder import Recorder

if TYPE_CHECKING:
    from kvcomm.engine import Output

__all__ = ["Generator", "Team", "TeamRun", "Turn", "TurnFailed"]


class Generator(Protocol):
    """What a team runs on: KVComm, or anything like it."""

    def generate(self, messages: Sequence[Message], /, *, agent: str, rule: Rule, max_new_tokens: int) -> Output:
        """Answer one prompt. Called from several threads at once only where `concurrent` is true."""
        ...


@dataclass(frozen=True)
class Turn:
    """One agent has spoken."""

    agent: str
    round: int  # from 1
    step: int  # of the round, from 1
    messages: tuple[Message, ...]
    output: Output
    wall_ms: float  # of the whole answer


@dataclass(frozen=True)
class TeamRun:
    """A finished run. Turns are in the order of rounds, steps, and agents."""

    turns: tuple[Turn, ...]

    @property
    def answer(self) -> str:
        """What the last agent said in the last round."""
        return self.turns[-1].output.text


class TurnFailed(KVCommError):
    """An agent could not answer; `__cause__` is why. `turns` holds all that were finished, those of its own step too."""

    def __init__(self, agent: str, round_: int, turns: tuple[Turn, ...], why: Exception) -> None:
        super().__init__(
            f"agent {agent!r} failed in round {round_} after {len(turns)} finished turns: {type(why).__name__}: {why}"
        )
        self.agent, self.round, self.turns = agent, round_, turns


@dataclass(frozen=True)
class Team:
    """Raises TeamError for a team that cannot be run."""

    agents: tuple[Agent, ...]
    topology: Topology
    rounds: int = 1
    record: str | Path | Recorder | None = field(default=None, compare=False)  # where every call is written down, with its text

    def __post_init__(self) -> None:
        if (names := tuple(a.name for a in self.agents)) != self.topology.agents:
            known = ", ".join(self.topology.agents)
            raise TeamError(
                f"the agents are {', '.join(names)}, those of the topology {known}; name the same in the same order"
            )
        self._check_rounds(self.rounds)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Team:
        """Reads a team file (docs/teams.md). Raises TeamError naming the file and what is wrong in it."""
        try:
            return cls.from_data(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except OSError as e:
            raise TeamError(f"team file {path} cannot be read: {e.strerror}; give the path of a YAML file") from e
        except (ValueError, yaml.YAMLError) as e:  # TeamError, bytes that are no text, values that are no value
            raise TeamError(f"team file {path}: {e}") from e

    @classmethod
    def from_data(cls, data: object) -> Team:
        """From plain lists and mappings: `agents`, and if wanted `topology`, `rounds` and `defaults` of the agents."""
        known = _keys("the team", data, ("agents", "defaults", "rounds", "topology"), needed=("agents",))
        allowed = [f.name for f in fields(Agent)]
        defaults = _keys("defaults", known.get("defaults", {}), [a for a in allowed if a != "name"])
        if not isinstance(rows := known["agents"], list) or not rows:
            raise TeamError(f"agents is {rows!r}; give a list of at least one agent")
        given = [_keys(f"agent {i}", row, allowed, needed=("name",)) for i, row in enumerate(rows, 1)]
        agents = tuple(Agent(**{**defaults, **row}) for row in given)
        spec = known.get("topology", "full")
        spec = spec if isinstance(spec, dict) else {"kind": spec}
        if (kind := spec.get("kind")) not in list(KINDS):
            raise TeamError(f"the topology's kind is {kind!r}; use one of {', '.join(KINDS)}")
        options = list(signature(KINDS[kind]).parameters.values())[1:]  # after the names
        needed = [o.name for o in options if o.default is o.empty]
        _keys(f"topology {kind}", spec, ("kind", *(o.name for o in options)), needed=needed)
        topology = KINDS[kind](tuple(a.name for a in agents), **{key: spec[key] for key in spec if key != "kind"})
        return cls(agents, topology, known.get("rounds", 1))

    def run(
        self, generator: Generator, request: Mapping[str, str], rounds: int | None = None, *, session: str | None = None
    ) -> TeamRun:
        """Every agent speaks once a round; nothing is changed but what the generator keeps, and the record where there is one.

        `request` holds every slot of every template but `said`; more fields do no harm. `session` is what the record calls this
        run. Raises before the first call TeamError if a slot is missing and OSError if the record cannot be opened, and
        TurnFailed when an agent's call raises.
        """
        rounds = self.rounds if rounds is None else rounds
        self._check_rounds(rounds)
        self._check_request(request)
        if self.record is None:
            return self._run(generator, request, rounds)
        own = nullcontext(self.record) if isinstance(self.record, Recorder) else Recorder(self.record)
        with own as recorder:
            return self._run(Recorded(generator, recorder, session or f"run-{uuid4().hex[:12]}"), request, rounds)

    def _run(self, generator: Generator, request: Mapping[str, str], rounds: int) -> TeamRun:
        by_name = {agent.name: agent for agent in self.agents}
        turns: dict[tuple[int, str], Turn] = {}
        for round_ in range(1, rounds + 1):
            for number, names in enumerate(self.topology.steps, 1):
                jobs: list[Callable[[], Turn]] = []
                for name in names:
                    agent = by_name[name]
                    heard = [agent.quoted(s, r, turns[r, s].output.text) for r, s in self.topology.hears(round_, name)]
                    messages = agent.messages(request, agent.join.join(heard))
                    jobs.append(partial(_speak, generator, agent, round_, number, messages))
                done, failed = _attempt(jobs, side_by_side=bool(getattr(generator, "concurrent", False)))
                turns |= {(turn.round, turn.agent): turn for turn in done}
                if failed:
                    at, why = failed
                    raise TurnFailed(names[at], round_, tuple(turns.values()), why) from why
        return TeamRun(tuple(turns.values()))

    def graph(self) -> str:
        """Who hears whom, as plain text."""
        width = max(len(a.name) for a in self.agents)
        lines = [f"{self.topology.kind}: agents {len(self.agents)}, rounds {self.rounds}"]
        for number, names in enumerate(self.topology.steps, 1):
            for name in names:
                now = [a for _, a in self.topology.hears(1, name)]
                before = [a for r, a in self.topology.hears(2, name) if r == 1] if self.rounds > 1 else []
                told = [f"hears {', '.join(now)}"] if now else []
                told += [f"from the round before {', '.join(before)}"] if before else []
                lines.append(f"  step {number}  {name:{width}}  {'; '.join(told)}".rstrip())
        return "\n".join(lines)

    def mermaid(self) -> str:
        """The same as a Mermaid flowchart; dotted edges carry what was said in the round before."""
        ids = {agent.name: f"a{i}" for i, agent in enumerate(self.agents, 1)}
        lines = ["flowchart LR", *(f'    {ids[name]}["{escape(name)}"]' for name in ids)]
        for arrow, edges in (("-->", self.topology.within), ("-.->", self.topology.across if self.rounds > 1 else frozenset())):
            lines += [f"    {ids[a]} {arrow} {ids[b]}" for a in ids for b in ids if (a, b) in edges]
        return "\n".join(lines)

    def _check_rounds(self, rounds: int) -> None:
        if type(rounds) is not int or rounds < 1:
            raise TeamError(f"rounds is {rounds!r}; it must be a whole number from 1")
        for agent in self.agents:
            if SAID not in agent.slots and any(self.topology.hears(r, agent.name) for r in range(1, min(rounds, 2) + 1)):
                raise TeamError(
                    f"agent {agent.name!r} hears others, but its template has no {{said}}; add it or take the edges away"
                )

    def _check_request(self, request: Mapping[str, str]) -> None:
        if SAID in request:
            raise TeamError("the request has a field 'said'; that slot is the team's, choose another name")
        for agent in self.agents:
            for slot in sorted(agent.slots - {SAID}):
                if slot not in request:
                    raise TeamError(
                        f"agent {agent.name!r} needs the field {slot!r}; the request has {', '.join(sorted(request)) or 'none'}"
                    )
                if not isinstance(request[slot], str):
                    raise TeamError(f"the request's field {slot!r} is {request[slot]!r}; it must be text")


def _speak(generator: Generator, agent: Agent, round_: int, step: int, messages: tuple[Message, ...]) -> Turn:
    began = perf_counter()
    output = generator.generate(messages, agent=agent.name, rule=agent.rule, max_new_tokens=agent.max_new_tokens)
    return Turn(agent.name, round_, step, messages, output, (perf_counter() - began) * 1e3)


def _attempt(jobs: list[Callable[[], Turn]], *, side_by_side: bool) -> tuple[list[Turn], tuple[int, Exception] | None]:
    """The turns of one step that were finished, and the first failure. One after the other, none is begun after a failure."""
    done: list[Turn] = []
    failed: tuple[int, Exception] | None = None
    if side_by_side:
        with ThreadPoolExecutor(len(jobs)) as pool:  # leaving it waits for all
            jobs = [pool.submit(copy_context().run, job).result for job in jobs]
    for at, job in enumerate(jobs):
        try:
            done.append(job())
        except Exception as why:  # noqa: BLE001  # raised again by run(), with the turns that are done
            failed = failed or (at, why)
            if not side_by_side:
                break
    return done, failed


def _keys(what: str, data: object, allowed: Sequence[str], needed: Sequence[str] = ()) -> dict[str, Any]:
    """`data` as a mapping with these keys only. Raises TeamError naming the key that is unknown or missing."""
    if not isinstance(data, dict):
        raise TeamError(f"{what} is {'empty' if data is None else repr(data)}; it must be a mapping with {', '.join(allowed)}")
    for key in data:
        if key not in allowed:
            raise TeamError(f"{what} has the unknown key {key!r}; allowed are {', '.join(allowed)}")
    for key in needed:
        if key not in data:
            raise TeamError(f"{what} has no {key!r}; add it")
    return data
