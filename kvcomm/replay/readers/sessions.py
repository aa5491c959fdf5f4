"""Puts the calls of a stream into the order of their sessions, and adds what a record left unsaid but others say.

A session is held until it has been silent for `IDLE` records, or until all held ones take more than `HELD_BYTES`: then the one
that has been silent for the longest leaves. So memory is bounded whatever the file's size, sessions may be interleaved, and a
span may come before the span that it is in. A session that goes on after it left is the same session; only what is found by
looking at its other calls (below) is then looked for among fewer of them.

- order: by start time where every call held of the session has one, else as in the file;
- an agent or session that the call does not name: from the spans around it; an agent that nobody names: by its system message;
- an output that is not recorded: the assistant's message that follows the same prompt in the agent's next call; or what
  another agent reads under its name; or, without names, the one new message in a conversation that goes on right after it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from kvcomm.replay.calls import Call, Message
from kvcomm.replay.readers.base import Around

__all__ = ["HELD_BYTES", "IDLE", "in_sessions"]

IDLE = 1024  # records of other sessions after which a session is over
HELD_BYTES = 32 << 20  # of text and bookkeeping in all sessions held, about
AROUND = 65536  # spans around calls that are remembered
OVERHEAD = 200  # bytes of a message or a call beside its text, about
SEARCHED = 64  # later calls of a session that may show an output

Spans = OrderedDict[tuple[str, str], Around]


@dataclass
class _Held:
    """The calls of one session so far. Mutable."""

    last: int  # number of the newest record
    calls: list[Call] = field(default_factory=list)
    texts: dict[Message, Message] = field(default_factory=dict)  # equal messages share memory
    nbytes: int = 0

    def add(self, call: Call) -> int:
        """Returns the bytes that it takes."""
        before = self.nbytes
        shared = []
        for m in call.messages:
            if m not in self.texts:
                self.texts[m] = m
                self.nbytes += OVERHEAD + len(m.content)
            shared.append(self.texts[m])
        self.calls.append(replace(call, messages=tuple(shared)))
        self.nbytes += OVERHEAD + 8 * len(shared) + len(call.output)
        return self.nbytes - before


def in_sessions(found: Iterable[Call | Around]) -> Iterator[Call]:
    """The calls among `found`, session by session."""
    spans: Spans = OrderedDict()
    held: OrderedDict[str, _Held] = OrderedDict()  # the longest silent first
    nbytes = 0
    for number, thing in enumerate(found):
        if isinstance(thing, Around):
            spans[thing.trace, thing.id] = thing
            if len(spans) > AROUND:
                spans.popitem(last=False)
            continue
        key = thing.session or f"trace {thing.extra.get('trace', '')}"
        session = held.setdefault(key, _Held(number))
        session.last = number
        held.move_to_end(key)
        nbytes += session.add(thing)
        while held and (nbytes > HELD_BYTES or next(iter(held.values())).last < number - IDLE):
            _, over = held.popitem(last=False)
            nbytes -= over.nbytes
            yield from _finished(over.calls, spans)
    for over in held.values():
        yield from _finished(over.calls, spans)


def _finished(calls: list[Call], spans: Spans) -> Sequence[Call]:
    if all(c.started is not None for c in calls):
        calls.sort(key=lambda c: c.started or 0.0)
    return _answered([_named(c, spans) if not (c.agent and c.session) else c for c in calls])


def _named(call: Call, spans: Spans) -> Call:
    """With the agent and session of the nearest spans around it that say so."""
    trace = str(call.extra.get("trace", ""))
    agent, session = call.agent, call.session
    at, seen = call.parent, set[str]()
    while at is not None and at not in seen and (trace, at) in spans:  # seen: spans may be said to be inside themselves
        seen.add(at)
        around = spans[trace, at]
        agent, session = agent or around.agent, session or around.session
        at = around.parent
    if not agent:
        told = "\n".join(m.content for m in call.messages if m.role == "system")
        agent = f"unnamed-{blake2b(told.encode(), digest_size=3).hexdigest()}"
    return replace(call, agent=agent, session=session or trace or "all")


def _answered(calls: list[Call]) -> list[Call]:
    """With outputs that the trace does not record but later prompts show."""
    if all(c.answered for c in calls):
        return calls
    out = list(calls)
    known: set[str] = set()  # contents of all prompts up to the call
    for i, call in enumerate(calls):
        known.update(m.content for m in call.messages)
        if not call.answered and (text := _shown(calls, i, known)) is not None:
            out[i] = replace(call, output=text, answered=True)
            known.add(text)
    return out


def _shown(calls: Sequence[Call], i: int, known: set[str]) -> str | None:
    call, length = calls[i], len(calls[i].messages)
    for other in calls[i + 1 : i + 1 + SEARCHED]:
        if other.agent == call.agent:
            if other.messages[:length] == call.messages and len(other.messages) > length:
                return other.messages[length].content if other.messages[length].role == "assistant" else None
            return None
        new = [m for m in other.messages if m.content not in known and m.role != "system"]
        if said := [m for m in new if m.name == call.agent]:
            return said[0].content
        if other is calls[i + 1] and len(new) == 1 and not new[0].name and _goes_on(other, calls[max(0, i - SEARCHED) : i]):
            return new[0].content if _as_long(new[0].content, call.extra.get("output_length")) else None
    return None


def _goes_on(call: Call, earlier: Sequence[Call]) -> bool:
    """Does its prompt begin with that of the same agent's last call?"""
    before = next((c.messages for c in reversed(earlier) if c.agent == call.agent), None)
    return before is not None and call.messages[: len(before)] == before


def _as_long(text: str, tokens: object) -> bool:
    """Could the text have so many tokens? Yes where it is not known."""
    return not isinstance(tokens, int) or tokens <= 1.5 * len(text) <= 15 * tokens
