"""Text as token numbers, good for nothing but being compared: by a tokenizer, or by an estimate that needs no download.

The estimate takes pre-tokens (words with the space in front, up to three digits, punctuation, white space) for tokens, which
for English and code is close to what byte-pair tokenizers count; for other text it is farther off.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvcomm.errors import InputError
from kvcomm.replay.calls import Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["ESTIMATE", "Hashes", "Text", "Tokens", "mixed", "sums"]

ESTIMATE = "estimate"
Hashes = npt.NDArray[np.uint64]
Split = Callable[[str], Hashes]

PRE_TOKEN = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # scripts without spaces: a token each
    r"|[ '\-/.(]?[^\W\d_]{1,16}|\d{1,3}| ?(?:[^\s\w]|_){1,4}[\r\n]*|\s*[\r\n]+|\s+(?=\s)|\s+|[^\W_]"
)
CACHED = 1 << 20  # tokens of messages that are remembered


@dataclass(frozen=True, eq=False)
class Text:
    """A message as what can be compared."""

    ids: Hashes  # [1 + tokens of the content]; the first stands for the role and what a chat template writes around it
    whole: int  # hash of the content

    @property
    def content(self) -> Hashes:
        return self.ids[1:]


class Tokens:
    """Numbers of the tokens of messages. Messages come again and again as histories grow, so they are remembered."""

    def __init__(self, name: str = ESTIMATE, split: Split | None = None) -> None:
        self.name, self._split = name, split or _estimated
        self._known: dict[tuple[str, str], Text] = {}
        self._held = 0

    @property
    def estimated(self) -> bool:
        return self.name == ESTIMATE

    def of(self, message: Message) -> Text:
        key = (message.role, message.content)
        found = self._known.get(key)
        if found is None:
            content = self._split(message.content)
            found = Text(np.concatenate([_role(message.role), content]), whole(content))
            if self._held > CACHED:
                self._known.clear()
                self._held = 0
            self._known[key] = found
            self._held += len(found.ids)
        return found

    @classmethod
    def from_file(cls, path: Path) -> Tokens:
        """By a `tokenizer.json`, or the one in a folder. Raises InputError for anything else."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"--tokenizer is {path}: no tokenizer.json there")
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as e:  # the library raises nothing narrower
            raise InputError(f"{file} is no tokenizer: {str(e)[:200]}") from e
        return cls(str(path), lambda text: _encoded(tokenizer, text))


def mixed(numbers: Hashes) -> Hashes:
    """splitmix64: near numbers become far ones, different ones stay different."""
    x = numbers + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sums(ids: Hashes) -> Hashes:
    """[tokens]; entry i hashes the first i + 1 tokens: sums of tokens mixed with their places."""
    return np.cumsum(mixed(ids ^ mixed(np.arange(len(ids), dtype=np.uint64))), dtype=np.uint64)


def whole(ids: Hashes) -> int:
    """Hash of a whole text, length included."""
    return int(mixed(np.array([len(ids)], dtype=np.uint64) + sums(ids)[-1:].sum(dtype=np.uint64))[0])


def _estimated(text: str) -> Hashes:
    words = PRE_TOKEN.findall(text)
    return mixed(np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64))


def _encoded(tokenizer: Tokenizer, text: str) -> Hashes:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return mixed(np.array(ids, dtype=np.uint64))


def _role(role: str) -> Hashes:
    return mixed(np.array([hash(("role", role))], dtype=np.int64).view(np.uint64))
