"""What a model's chat template makes of recorded messages, with templates as particular as those of known models."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from kvcomm.errors import InputError
from kvcomm.replay.calls import Message
from kvcomm.replay.wording import Wording
from kvcomm.tiny import FOLDER

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FIRST_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('System first') }}{% endif %}"
    "{% endfor %}" + PLAIN
)
ALTERNATING = (  # as Mistral's and Gemma's
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}"
    "{% endif %}{% endfor %}" + PLAIN
)
NOTHING = "{{ raise_exception('no') }}"


def wording(template: str | None = None) -> Wording:
    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER)
    if template is not None:
        tokenizer.chat_template = template
    return Wording(tokenizer)


def roles(words: Wording, *given: str) -> list[tuple[str, str]]:
    chat, _ = words.chat([Message(role, f"text {i}") for i, role in enumerate(given)])
    words.prompt(chat)
    return [(m["role"], m["content"]) for m in chat]


def test_what_fits_stays() -> None:
    words = wording()
    assert [r for r, _ in roles(words, "system", "user", "user", "assistant", "system")] == [
        "system", "user", "user", "assistant", "system",
    ]  # fmt: skip
    assert not words.chat([Message("user", "hello")])[1]


def test_roles_that_nobody_knows() -> None:
    words = wording()
    assert [r for r, _ in roles(words, "developer", "tool", "critic", "")] == ["system", "user", "user", "user"]
    assert words.chat([Message(role, "text") for role in ("developer", "tool", "critic", "", "user")])[1] == {
        "role 'developer' told as system": 1,
        "role 'tool' told as user": 1,
        "role 'critic' told as user": 1,
        "role '' told as user": 1,
    }


def test_templates_that_refuse() -> None:
    assert [r for r, _ in roles(wording(FIRST_SYSTEM), "system", "user", "system")] == ["system", "user", "user"]
    words = wording(ALTERNATING)
    assert roles(words, "system", "user", "user", "assistant", "system") == [
        ("user", "text 0\n\ntext 1\n\ntext 2"),
        ("assistant", "text 3"),
        ("user", "text 4"),
    ]
    assert words.chat([Message(role, "text") for role in ("system", "user", "user", "assistant", "system")])[1] == {
        "late system message told as user": 1,
        "joined with the message before, of the same role": 2,
        "system message put in front of the user's first": 1,
    }
    assert [r for r, _ in roles(wording(ALTERNATING), "assistant", "assistant", "user")] == ["user"]
    with pytest.raises(InputError, match=r"chat template refuses it: no"):
        roles(wording(NOTHING), "user")
    with pytest.raises(InputError, match="no messages"):
        wording().chat([])


def test_no_template() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.chat_template = None
    for without in (tokenizer, None):
        with pytest.raises(InputError, match="no chat template"):
            Wording(without)


@pytest.mark.parametrize("output", ["city of elsa is milan .", " pasted with space\n", "", "Zwölf Boote & <b>", "a" * 500])
def test_answers_are_what_a_reader_of_the_chat_sees(output: str) -> None:
    """Prompt and answer together are the beginning of the conversation with the answer in it, token by token."""
    words = wording()
    chat, _ = words.chat([Message("system", "be brief"), Message("user", "city of elsa ?")])
    prompt, answer = words.prompt(chat), words.answer(chat, output)
    whole = words.tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": output}], return_dict=False)
    assert prompt + answer == whole
    assert answer[-1] == words.tokenizer.eos_token_id
    assert words.text(answer).strip() == output.strip()


def test_answers_that_a_template_changes() -> None:
    """Where the template does not give the text back, the text stands alone, with the token that ends it."""
    words = wording("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    chat, _ = words.chat([Message("user", "hello")])
    ids = words.tokenizer.encode("small words", add_special_tokens=False)
    assert words.answer(chat, "small words") == [*ids, words.tokenizer.eos_token_id]
