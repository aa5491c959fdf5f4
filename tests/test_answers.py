"""Alignment of an answer with its re-encoding, against the definition: ids agree where a block says so, the rest is missing."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.answers import Block, align


def test_same_ids_lack_only_the_last() -> None:
    found = align([5, 6, 7], [5, 6, 7], cached=2)
    assert found.missing.tolist() == [2]
    assert not found.in_place


def test_an_ended_answer_is_whole() -> None:
    """The end token was sampled last, so everything readers see has KV."""
    found = align([5, 6, 7, 1], [5, 6, 7], cached=3)
    assert found.in_place
    assert found.missing.tolist() == []


def test_two_tokens_read_as_one() -> None:
    found = align([5, 6, 10, 10, 7, 8, 1], [5, 6, 11, 7, 8], cached=6)
    assert [(b.generated, b.canonical, b.tokens) for b in found.blocks] == [(0, 0, 2), (4, 3, 2)]
    assert found.missing.tolist() == [2]


def test_long_repetitive_answers_are_aligned_at_their_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quadratic part gets 512 tokens at most; what it does not get has no KV, and the ends have theirs."""
    given_tokens: list[int] = []

    def counting(junk: None, a: list[int], b: list[int], **options: Any) -> Any:
        given_tokens.append(max(len(a), len(b)))
        return SequenceMatcher(junk, a, b, **options)

    monkeypatch.setattr("kvcomm.answers.SequenceMatcher", counting)
    line = [7, 8] * 20
    generated, canonical = [*line, 1, 1, *([7] * 700), 2, 2, *line], [*line, 3, *([7] * 700), 4, *line]
    found = align(generated, canonical, cached=len(generated) - 1)
    assert found.blocks == (Block(0, 0, 40), Block(744, 742, 39))
    assert found.missing.tolist() == [*range(40, 742), len(canonical) - 1]
    assert not given_tokens
    found = align([*line, 1, 1, 9, 9, 2, *line], [*line, 3, 9, 9, 4, *line], cached=85)
    assert found.blocks == (Block(0, 0, 40), Block(42, 41, 2), Block(45, 44, 40))
    assert given_tokens == [5]


def test_an_answer_that_was_cut_short_keeps_its_end() -> None:
    """Stopped at its limit, the answer ends in a token without KV, which is no reason to lose those in front of it."""
    found = align([5, 6, 10, 10, 7, 8, 9], [5, 6, 11, 7, 8, 9], cached=6)
    assert found.blocks == (Block(0, 0, 2), Block(4, 3, 2))
    assert found.missing.tolist() == [2, 5]


@given(st.lists(st.integers(0, 4), max_size=40), st.lists(st.integers(0, 4), max_size=40), st.integers(0, 40))
def test_blocks_and_missing_partition_the_answer(generated: list[int], canonical: list[int], cached: int) -> None:
    cached = min(cached, len(generated))
    found = align(generated, canonical, cached)
    seen = found.missing.tolist()
    for block in found.blocks:
        assert block.generated + block.tokens <= cached
        for i in range(block.tokens):
            assert generated[block.generated + i] == canonical[block.canonical + i]
            seen.append(block.canonical + i)
    assert sorted(seen) == list(range(len(canonical)))
