"""The calls of a trace added up: shares of prompt tokens, per agent, per pair of agents, and a verdict in a sentence.

Nothing is looked for across sessions. Memory is bounded: of more than `OPEN` sessions, or more than `KNOWN_BYTES` of what they
had, those that have been silent for the longest are forgotten; agents beyond the first `NAMES` are added up as one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from kvcomm.replay.analysis.overlap import MIN_RUN, Overlap, Session
from kvcomm.replay.analysis.tokens import Tokens
from kvcomm.replay.calls import Call, Message

__all__ = ["OTHERS", "Agent", "Totals", "quantile"]

OPEN = 64  # sessions; they come one after the other, unless many that are large are interleaved
KNOWN_BYTES = 256 << 20  # of their tables
DROPPED = 1 << 16  # names of dropped sessions that are remembered
NAMES = 1000  # agents that are told apart in the result
FORGOTTEN = 0.05  # share of calls that began a dropped session anew from which there is no verdict
OTHERS = "(others)"


@dataclass
class Agent:
    """One agent's calls, in tokens. Mutable."""

    calls: int = 0
    tokens: int = 0
    prefix: int = 0
    prefix_own: int = 0
    prefix_other: int = 0
    cross: int = 0
    own: int = 0
    whole_messages: int = 0

    def add(self, overlap: Overlap) -> None:
        self.calls += 1
        self.tokens += overlap.tokens
        self.prefix += overlap.prefix
        self.prefix_own += overlap.prefix_own
        self.prefix_other += overlap.prefix_other
        self.cross += overlap.cross
        self.own += overlap.own
        self.whole_messages += overlap.whole_messages

    @property
    def fresh(self) -> int:
        return self.tokens - self.prefix - self.cross - self.own


@dataclass
class Totals:
    """Mutable: grows with every call."""

    tokens: Tokens = field(default_factory=Tokens)
    min_run: int = MIN_RUN
    all: Agent = field(default_factory=Agent)
    agents: dict[str, Agent] = field(default_factory=dict)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)  # (who had it, who reads it) -> tokens
    runs: Counter[int] = field(default_factory=Counter)  # length -> how many
    by_length: Counter[int] = field(default_factory=Counter)  # shortest run looked for -> tokens
    sessions: int = 0
    unanswered: int = 0  # calls of which the trace does not say what was answered
    unnamed: int = 0  # calls of agents that nobody names
    forgotten: int = 0  # times that a session went on after it had been dropped, and was begun anew
    _open: OrderedDict[str, Session] = field(default_factory=OrderedDict)  # the longest silent first
    _dropped: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _nbytes: int = 0

    def add(self, call: Call) -> Overlap:
        session = self._open.pop(call.session, None)
        if session is None:
            session = Session(self.min_run)
            known = call.session in self._dropped
            self.sessions += not known
            self.forgotten += known
        else:
            self._nbytes -= session.nbytes
        messages = [self.tokens.of(m) for m in call.messages]
        overlap = session.add(call.agent, messages, self.tokens.of(Message("assistant", call.output)))
        self._open[call.session] = session
        self._nbytes += session.nbytes
        while len(self._open) > OPEN or self._nbytes > KNOWN_BYTES:
            name, dropped = self._open.popitem(last=False)
            self._nbytes -= dropped.nbytes
            self._dropped[name] = None
            if len(self._dropped) > DROPPED:
                self._dropped.popitem(last=False)
        self.all.add(overlap)
        self._agent(call.agent).add(overlap)
        for source, count in overlap.sources.items():
            self.pairs[self._name(source), self._name(call.agent)] += count
        self.runs.update(overlap.runs)
        self.by_length.update(overlap.cross_by_length)
        self.unanswered += not call.answered
        self.unnamed += call.agent.startswith("unnamed-")
        return overlap

    def share(self, tokens: int) -> float:
        return tokens / self.all.tokens if self.all.tokens else 0.0

    @property
    def addressable(self) -> float | None:
        """Of what a prefix cache that forgets nothing still prefills, the share in other agents' texts."""
        rest = self.all.tokens - self.all.prefix
        return self.all.cross / rest if rest else None

    def verdict(self) -> str:
        """One sentence, whichever way it goes, unless too much was forgotten to tell."""
        if self.forgotten and self.forgotten >= FORGOTTEN * self.all.calls:
            return (
                f"Cannot be told: at {self.forgotten:,} of {self.all.calls:,} calls the session had been forgotten, so what "
                "is shared counts as new. Sort the trace by session, or analyze some of its sessions with --session."
            )
        prefix, cross = (f"{100 * self.share(n):.0f} %" for n in (self.all.prefix, self.all.cross))
        per_call = f"{self.all.cross / max(1, self.all.calls):,.0f} tokens per call"
        rest = f"{100 * (self.addressable or 0.0):.0f} % of what a prefix cache still has to prefill"
        found = f"{cross} of all prompt tokens ({per_call}) stand in another agent's text where no prefix cache finds them"
        if len(self.agents) < 2:
            return f"Not worth it: there is one agent, so there is nobody to share with; {prefix} is prefix-shareable already."
        if self.share(self.all.cross) >= 0.15:
            return f"Worth it: {found}, which is {rest}."
        if self.share(self.all.cross) >= 0.05:
            return f"Worth a try: {found}, which is {rest}; {prefix} is prefix-shareable already."
        if self.share(self.all.prefix) >= 0.5:
            return f"Not worth it: {prefix} is prefix-shareable already, and only {found}."
        return f"Not worth it: {100 * self.share(self.all.fresh):.0f} % is new to its session, and only {found}."

    def _agent(self, name: str) -> Agent:
        return self.agents.setdefault(self._name(name), Agent())

    def _name(self, name: str) -> str:
        return name if name in self.agents or len(self.agents) < NAMES else OTHERS


def quantile(counts: Counter[int], share: float) -> int | None:
    """The smallest value that so large a share of all counted ones do not exceed."""
    wanted = share * counts.total()
    for value in sorted(counts):
        wanted -= counts[value]
        if wanted <= 0:
            return value
    return None
