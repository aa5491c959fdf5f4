"""The graph of a trace's calls: their order, who reads whose output, and how many hops deep a call is.

A call reads another when an earlier output of its session stands in one of its messages, character for character (white space
around it aside): as a whole message, or, from LEAST characters on, as a part of one. Of calls with the same output, those
nearest in time are meant. Text alone: knows nothing of models.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvcomm.replay.calls import Call, Message

__all__ = ["Read", "Turn", "order", "rewritten"]

LEAST = 16  # characters; shorter outputs count where they are a whole message only


@dataclass(frozen=True)
class Read:
    """`messages[message].content[start:end]` is the output of turn `source`."""

    message: int
    start: int
    end: int
    source: int


@dataclass(frozen=True)
class Turn:
    """A call in its place."""

    number: int  # in order of replay, from 0
    call: Call
    reads: tuple[Read, ...] = ()
    hop: int = 0  # the longest chain of outputs that led to it; 0: it reads nobody's


def order(calls: Iterable[Call]) -> list[Turn]:
    """Sessions as they first appear, one after the other; within one by starting time where all its calls have one, else as
    they stand in the trace.
    """
    sessions: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        sessions[call.session].append(call)
    turns: list[Turn] = []
    for group in sessions.values():
        if all(call.started is not None for call in group):
            group.sort(key=lambda call: call.started or 0.0)
        known = _Outputs()
        hops: dict[int, int] = {}
        for call in group:
            number = len(turns)
            reads = known.read_by(call)
            hops[number] = max((hops[read.source] + 1 for read in reads), default=0)
            turns.append(Turn(number, call, reads, hops[number]))
            known.add(number, call)
    return turns


def rewritten(turn: Turn, outputs: Mapping[int, str]) -> tuple[Message, ...]:
    """The messages of a turn with what it reads replaced: `outputs` by turn; what is not there stays as it was recorded."""
    messages = list(turn.call.messages)
    for read in sorted(turn.reads, key=lambda read: -read.start):
        if read.source in outputs:
            was = messages[read.message]
            text = was.content[: read.start] + outputs[read.source].strip() + was.content[read.end :]
            messages[read.message] = replace(was, content=text)
    return tuple(messages)


class _Outputs:
    """What has been said in one session. Every message text is searched once: when it is read for the first time."""

    def __init__(self) -> None:
        self._said: dict[str, list[tuple[int, Call]]] = defaultdict(list)  # output -> by whom, in order
        self._heads: dict[str, list[str]] = defaultdict(list)  # first LEAST characters -> outputs, the longest first
        self._found: dict[str, list[tuple[int, int, str]]] = {}  # message text -> start, end, output

    def add(self, number: int, call: Call) -> None:
        text = call.output.strip()
        if not text:
            return
        if text not in self._said and len(text) >= LEAST:
            same = self._heads[text[:LEAST]]
            same.append(text)
            same.sort(key=len, reverse=True)
        self._said[text].append((number, call))

    def read_by(self, call: Call) -> tuple[Read, ...]:
        places: list[tuple[int, int, int, str]] = []
        for i, message in enumerate(call.messages):
            if message.content not in self._found:
                self._found[message.content] = self._search(message.content)
            places += [(i, *found) for found in self._found[message.content]]
        times = Counter(output for *_, output in places)
        reads = []
        for at, start, end, output in places:
            sources = [number for number, other in self._said[output] if _ended_before(other, call)]
            if sources:
                nth = sources[-times[output] :]
                reads.append(Read(at, start, end, nth[0]))
                times[output] = max(times[output] - 1, 1)
        return tuple(reads)

    def _search(self, content: str) -> list[tuple[int, int, str]]:
        whole = content.strip()
        if whole in self._said:
            start = content.index(whole)
            return [(start, start + len(whole), whole)]
        found, at = list[tuple[int, int, str]](), 0
        if not self._heads:
            return found
        while at + LEAST <= len(content):
            outputs: Sequence[str] = self._heads.get(content[at : at + LEAST], ())
            output = next((o for o in outputs if content.startswith(o, at)), None)
            if output is None:
                at += 1
            else:
                found.append((at, at + len(output), output))
                at += len(output)
        return found


def _ended_before(other: Call, call: Call) -> bool:
    """Where the trace does not tell, the order of calls does."""
    return other.ended is None or call.started is None or other.ended <= call.started
