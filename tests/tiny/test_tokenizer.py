"""The embedded model's tokenizer: lossless on any text, one token a word, and the same ids that training used."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvcomm.tiny import FOLDER, sequences, tokenizer, train
from kvcomm.tiny.words import all_words


@pytest.fixture(scope="module")
def built() -> PreTrainedTokenizerFast:
    return tokenizer.build()


@pytest.fixture(scope="module")
def shipped() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(FOLDER)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@given(text=st.text(max_size=60))
def test_any_text_survives(shipped: PreTrainedTokenizerFast, text: str) -> None:
    for special in tokenizer.SPECIAL:
        text = text.replace(special, "")
    assert shipped.decode(shipped(text).input_ids) == text


def test_every_word_is_one_token(built: PreTrainedTokenizerFast) -> None:
    for word in all_words():
        assert len(built(f" {word}").input_ids) == 1, word


def test_the_shipped_tokenizer_is_the_built_one(built: PreTrainedTokenizerFast, shipped: PreTrainedTokenizerFast) -> None:
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.chat_template == built.chat_template
    assert shipped.eos_token == "<|end|>"


def test_training_saw_what_the_chat_template_gives(built: PreTrainedTokenizerFast) -> None:
    """The training encoder (split by spaces) against the tokenizer on the same conversation."""
    encode = sequences.Encoder(built)
    for seed in range(20):
        sequence = sequences.team_sequence(random.Random(seed), train.CURRICULUM[-1], 1024, encode)
        text = built.decode(sequence.ids)
        assert built(text, add_special_tokens=False).input_ids == sequence.ids
        assert len(sequence.ids) == len(sequence.weights)
    messages = [{"role": "system", "content": "you are the clerk ."}, {"role": "user", "content": "city of bob ?"}]
    ids = built.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == encode("<bos> <|system|> you are the clerk . <|end|> <|user|> city of bob ? <|end|> <|assistant|>")


def test_chat_template_and_tools(built: PreTrainedTokenizerFast) -> None:
    """A call leaves no words, its result is read as a user's message, and what has words is what it was without tools."""
    call = {"id": "a", "type": "function", "function": {"name": "ask_clerk", "arguments": "{}"}}
    said = {"role": "user", "content": " city of bob ? "}
    result = {"role": "tool", "tool_call_id": "a", "content": "clerk says : oslo ."}

    def rendered(*messages: Any) -> str:
        text = built.apply_chat_template(list(messages), tokenize=False)
        assert isinstance(text, str)
        return text

    for nothing in (None, ""):
        asked = {"role": "assistant", "content": nothing, "tool_calls": [call]}
        assert rendered(said, asked, result) == "<bos><|user|> city of bob ?<|end|><|user|> clerk says : oslo .<|end|>"
    asked = {"role": "assistant", "content": "well .", "tool_calls": [call]}
    assert rendered(said, asked) == rendered(said, {"role": "assistant", "content": "well ."})
    empty = {"role": "assistant", "content": ""}
    assert rendered(said, empty) == "<bos><|user|> city of bob ?<|end|><|assistant|> <|end|>"
