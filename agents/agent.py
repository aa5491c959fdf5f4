"""One agent of a team: who it is, and how its prompt is made. Knows nothing of the others, of models or of caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import get_args

from kvcomm.errors import TeamError
from kvcomm.policy import Rule

__all__ = ["SAID", "Agent", "Message"]

Message = Mapping[str, str]
"""One chat message: `role` and `content`."""

SAID = "said"
"""The slot that the team fills; every other slot is a field of the request."""


@dataclass(frozen=True)
class Agent:
    """Raises TeamError for a value that cannot be used."""

    name: str
    role: str = ""  # the system message, word for word; none where it is empty
    rule: Rule = "auto"
    template: str = "{input} {said}"  # of the user message
    quote: str = "{name} says : {text}"  # how this agent reads what another one said; {round} is known too
    join: str = " "  # between two quotes
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        for field in ("name", "role", "rule", "template", "quote", "join"):
            if not isinstance(value := getattr(self, field), str):
                raise TeamError(f"agent {self.name!r}: {field} is {value!r}; it must be text, so put it in quotes")
        if not self.name or self.name != self.name.strip():
            raise TeamError(f"an agent's name is {self.name!r}; it must be text without white space around it")
        if self.rule not in get_args(Rule):
            raise TeamError(f"agent {self.name!r}: rule is {self.rule!r}; use {' or '.join(get_args(Rule))}")
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise TeamError(f"agent {self.name!r}: max_new_tokens is {self.max_new_tokens!r}; it must be a whole number from 1")
        if not self.slots:
            raise TeamError(f"agent {self.name!r}: its template has no slot; write at least {{input}}")
        known, used = {"name", "round", "text"}, self._parse("quote")
        if "text" not in used or not used <= known:
            raise TeamError(
                f"agent {self.name!r}: quote is {self.quote!r}; it needs {{text}} and may have {{name}} and {{round}}"
            )

    @cached_property
    def slots(self) -> frozenset[str]:
        """The names in its template."""
        return self._parse("template")

    def messages(self, fields: Mapping[str, str], said: str) -> tuple[Message, ...]:
        """Its prompt. `fields` must hold every slot but `said`."""
        user: Message = {"role": "user", "content": _fill(self.template, {**fields, SAID: said})}
        return ({"role": "system", "content": self.role}, user) if self.role else (user,)

    def quoted(self, name: str, round_: int, text: str) -> str:
        """What agent `name` said in that round, as this agent reads it."""
        return _fill(self.quote, {"name": name, "round": str(round_), "text": text})

    def _parse(self, field: str) -> frozenset[str]:
        text = getattr(self, field)
        try:
            parts = [part[1:] for part in Formatter().parse(text) if part[1] is not None]
        except ValueError as e:
            raise TeamError(f"agent {self.name!r}: {field} is {text!r}: {e}; a brace that is no slot is written twice") from e
        for slot, spec, conversion in parts:
            if not (slot and slot.isidentifier()) or spec or conversion:
                raise TeamError(
                    f"agent {self.name!r}: {field} has the slot {slot!r}; a slot is one plain name, as in {{input}}"
                )
        return frozenset(slot for slot, _, _ in parts if slot)


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Values are put in as they are; an empty one takes the white space in front of its slot along, so no gap is left."""
    out = ""
    for literal, slot, _, _ in Formatter().parse(template):
        out += literal
        if slot is not None:
            out = out + values[slot] if values[slot].strip() else out.rstrip()
    return out.strip()
