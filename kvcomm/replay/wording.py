"""How one model reads a recorded call: messages in roles that its chat template takes, and the token ids of prompt and answer.

Roles that templates do not agree on are told as another one, and what a template still refuses (two messages of one role in a
row, a system message) is joined; both are counted, by what was done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from kvcomm.errors import InputError
from kvcomm.replay.calls import Message

__all__ = ["Chat", "Wording"]

Chat = list[dict[str, str]]
TOLD_AS = {"developer": "system", "tool": "user", "function": "user", "human": "user", "ai": "assistant", "model": "assistant"}
ROLES = ("system", "user", "assistant")


class Wording:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises InputError for a tokenizer that cannot put messages into a prompt."""
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise InputError("this model has no chat template, so nobody knows how it reads messages; use a chat model")
        self.tokenizer = tokenizer

    def chat(self, messages: Sequence[Message]) -> tuple[Chat, Counter[str]]:
        """What the template takes of `messages`, and how many were changed in which way. Raises InputError where it takes
        nothing of them.
        """
        if not messages:
            raise InputError("it has no messages")
        done: Counter[str] = Counter()
        made = [{"role": _role(m.role, done), "content": m.content} for m in messages]
        error = self._refusal(made)
        for repair in (_one_system, _joined, _no_system):
            if error is None:
                break
            made = repair(made, done)
            error = self._refusal(made)
        if error is None:
            return made, done
        raise InputError(f"the model's chat template refuses it: {error}")

    def prompt(self, chat: Chat) -> list[int]:
        """Ids of a chat up to where its answer begins."""
        ids: list[int] = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        return ids

    def answer(self, chat: Chat, output: str) -> list[int]:
        """Ids that the model would have given for `output`, up to the one that ends it: what its template puts behind the
        prompt, where that is the text again, else the text alone.
        """
        end = self.tokenizer.eos_token_id
        ends = [] if end is None else [int(end)]
        before = self._text(chat, True)
        try:
            whole = self._text([*chat, {"role": "assistant", "content": output}], False)
        except TemplateError:
            whole = ""
        if before and whole.startswith(before):
            ids: list[int] = self.tokenizer.encode(whole[len(before) :], add_special_tokens=False)
            if ends and ends[0] in ids:
                ids = ids[: ids.index(ends[0]) + 1]
                if self.text(ids).strip() == output.strip():
                    return ids
        return [*self.tokenizer.encode(output, add_special_tokens=False), *ends]

    def text(self, ids: Sequence[int]) -> str:
        said: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return said

    def piece(self, token: int) -> str:
        """One token as a person reads it."""
        said: str = self.tokenizer.decode([token])
        return said

    def _text(self, chat: Chat, asks: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(chat, add_generation_prompt=asks, tokenize=False)
        return text

    def _refusal(self, chat: Chat) -> str | None:
        try:
            self._text(chat, True)
        except TemplateError as error:
            return str(error) or type(error).__name__
        return None


def _role(role: str, done: Counter[str]) -> str:
    told = role if role in ROLES else TOLD_AS.get(role, "user")
    if told != role:
        done[f"role {role!r} told as {told}"] += 1
    return told


def _one_system(chat: Chat, done: Counter[str]) -> Chat:
    """System messages but the first are told as user's."""
    late = [m for m in chat[1:] if m["role"] == "system"]
    if late:
        done["late system message told as user"] += len(late)
    return [*chat[:1], *({**m, "role": "user"} if m["role"] == "system" else m for m in chat[1:])]


def _joined(chat: Chat, done: Counter[str]) -> Chat:
    """Messages of one role in a row become one; a chat that begins with the assistant begins with the user."""
    made: Chat = []
    for message in chat:
        if made and made[-1]["role"] == message["role"]:
            made[-1] = {**message, "content": f"{made[-1]['content']}\n\n{message['content']}"}
            done["joined with the message before, of the same role"] += 1
        else:
            made.append(dict(message))
    first = next((i for i, m in enumerate(made) if m["role"] != "system"), None)
    if first is not None and made[first]["role"] == "assistant":
        made[first]["role"] = "user"
        done["leading assistant message told as user"] += 1
        return _joined(made, done)
    return made


def _no_system(chat: Chat, done: Counter[str]) -> Chat:
    """The system message becomes the beginning of the user's first."""
    if chat[0]["role"] != "system":
        return chat
    done["system message put in front of the user's first"] += 1
    return _joined([{**chat[0], "role": "user"}, *chat[1:]], done)
