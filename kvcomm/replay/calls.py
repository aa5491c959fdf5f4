"""What a trace holds, whatever format it came in: calls of a model by agents, in the order in which they were made.

No torch, no tokenizer: text alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Call", "Message"]


@dataclass(frozen=True)
class Message:
    """One message of a prompt. Whatever is not text (images, audio) is not here."""

    role: str
    content: str
    name: str = ""  # the agent that speaks, where the trace says so


@dataclass(frozen=True)
class Call:
    """One call of a model."""

    session: str  # calls of one session belong together; nothing is looked for across sessions unless asked
    agent: str
    messages: tuple[Message, ...]  # what the model read, in order
    output: str  # what it wrote; tool calls as their JSON
    id: str = ""  # the trace's own name of it
    parent: str | None = None  # id of the call or span that it was made in
    started: float | None = None  # seconds since the epoch, or since the trace began
    ended: float | None = None
    where: str = ""  # file:line, for messages about it
    extra: Mapping[str, object] = field(default_factory=dict)  # model, recorded token counts: never needed
    answered: bool = True  # False: the trace does not say what the model wrote, and `output` is empty
