"""How often a text that several agents read was prefilled: once is the least, and once per reader what not sharing costs.

A document counts as prefilled by a call when that computed more than half of its tokens. Reports say how many tokens of a span
were computed again, not which: all of them are counted to each document that the span touches, so nothing is counted too low.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcomm.segments import ReuseReport

if TYPE_CHECKING:
    from kvcomm.agents.agent import Message

__all__ = ["Passage", "Reader"]


@dataclass(frozen=True)
class Passage:
    """A document as it stands in one prompt."""

    document: int  # its number among the request's
    tokens: int
    computed: int  # at most

    @property
    def prefilled(self) -> bool:
        return 2 * self.computed > self.tokens


class Reader:
    """Finds documents in prompts by the places of their characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def passages(self, messages: Sequence[Message], documents: Sequence[str], report: ReuseReport) -> tuple[Passage, ...]:
        """Of those documents that the prompt holds. Raises ValueError where the tokenizer does not say which characters a token
        stands for, or the prompt of the report was another one.
        """
        text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = np.asarray(encoded["offset_mapping"])
        if len(places) != report.prompt_tokens:
            raise ValueError(f"the prompt has {len(places)} tokens, and {report.prompt_tokens} were served")
        found = []
        for number, document in enumerate(documents):
            at = text.find(document)
            if at >= 0:
                within = np.flatnonzero((places[:, 0] < at + len(document)) & (places[:, 1] > at))
                start, end = int(within[0]), int(within[-1]) + 1
                found.append(Passage(number, end - start, _computed(report, start, end)))
        return tuple(found)


def _computed(report: ReuseReport, start: int, end: int) -> int:
    """Tokens of [start, end) that were computed, at most."""
    computed = end - start
    for span in report.spans:
        shared = max(0, min(end, span.end) - max(start, span.start))
        computed -= shared - min(shared, span.recomputed_tokens)
    return computed
