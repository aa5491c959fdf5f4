"""The contract of a player: who serves one call under one policy, with its recorded answer or with an answer of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvcomm.replay.measure import Heard
from kvcomm.replay.policies import Policy
from kvcomm.replay.wording import Chat, Wording

__all__ = ["Asked", "Player", "Served"]


@dataclass(frozen=True)
class Asked:
    """One call, as it is put to a model."""

    session: str
    agent: str
    chat: Chat
    ids: Sequence[int]  # of `chat`
    answer: Sequence[int] | None  # what is to be said; None: what the model says
    new_tokens: int  # at most, where the model speaks itself
    changes: Mapping[str, int] = field(default_factory=dict)  # what was done to be readable for the model: messages


@dataclass(frozen=True, eq=False)
class Served:
    """What came of it."""

    ttft_ms: float | None
    reused_tokens: int
    tokens_by_rung: Mapping[Any, int]  # reused; `dense` holds what was computed
    fallback: str | None  # why nothing was reused
    answer: Sequence[int]  # ids, the one that ends it included
    heard: Heard


class Player(Protocol):
    """One model under several policies, which know nothing of each other. What a call leaves behind, later calls of its
    session find, under the same policy.
    """

    wording: Wording
    limit: int | None  # tokens of prompt and answer that the model can hold

    def identity(self) -> str:
        """Tells apart what may give other results: the model's fingerprint and the engine."""
        ...

    def begin(self) -> None:
        """Forgets what earlier calls have left."""
        ...

    def serve(self, policy: Policy, asked: Asked) -> Served:
        """Serves and learns. Raises RuntimeError where the model itself fails."""
        ...

    def dense(self, asked: Asked, answer: Sequence[int]) -> Heard:
        """What the model says of `answer` behind the prompt when everything is computed; nothing is learned or reused."""
        ...
