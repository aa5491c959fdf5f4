"""The embedded model's tokenizer: one token for every word of its language, bytes for everything else, so that any text
survives encoding. Written as a standard `tokenizer.json` with a chat template; nothing of ours is needed to load it.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvcomm.tiny.words import all_words

__all__ = ["CHAT_TEMPLATE", "SPECIAL", "build"]

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "<bos>{% for m in messages if m['content'] or not m['tool_calls'] %}"
    "{{ '<|' + ('user' if m['role'] == 'tool' else m['role']) + '|> ' + (m['content'] | trim) + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORD = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]|\s+"


def build() -> PreTrainedTokenizerFast:
    """The tokenizer; `<|end|>` ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes as printable characters; a space is "Ġ"
    vocabulary = [*SPECIAL, *alphabet, *(f"Ġ{word}" for word in all_words())]
    vocabulary = list(dict.fromkeys(vocabulary))
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(vocabulary)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORD), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<|end|>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    build().save_pretrained(Path(__file__).parent)
