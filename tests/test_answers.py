"""Alignment of an answer with its re-encoding, against the definition: ids agree where a block says so, the rest is missing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcomm.answers import align


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
