"""Matching against a quadratic reference on made-up text, its bounds, and its cost counted in comparisons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.errors import InputError
from kvcomm.matching import WINDOW, Match, TextIndex
from kvcomm.segments import Ids, Segment

UNBOUNDED = 1 << 30  # variants: so many that no place is ever displaced


def array(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, dtype=np.int32)


def text(seed: int, tokens: int, vocabulary: int = 50_000) -> Ids:
    return np.random.default_rng(seed).integers(1, vocabulary, tokens).astype(np.int32)


def segment(ids: Sequence[int] | Ids, context: Sequence[int] | Ids = (), *, exact: bool = True, **identity: str) -> Segment:
    return Segment(array(ids), array(context), **{"fingerprint": "f", **identity}, exact=exact)  # type: ignore[arg-type]  # str


def find(index: TextIndex, prompt: Ids, fingerprint: str = "f", tenant: str = "") -> list[Match]:
    return index.find(prompt, fingerprint=fingerprint, tenant=tenant)


def index_of(*segments: Segment, variants: int = UNBOUNDED) -> TextIndex:
    index = TextIndex(variants=variants)
    for s in segments:
        assert index.add(s) == ()
    index.check_integrity()
    return index


# --- the reference: every pair of positions ---------------------------------------------------------------------------------


def is_exact(s: Segment, offset: int, start: int, prompt: list[int]) -> bool:
    return s.exact and s.start + offset == start and [*s.context, *s.ids[:offset]] == prompt[:start]


def runs(s: Segment, prompt: list[int], floor: int, least: int) -> list[tuple[int, int, int]]:
    """(start, end, offset) of the maximal common runs that start at `floor` or later, by the table of all pairs."""
    ids = s.ids.tolist()
    ahead = [[0] * (len(ids) + 1) for _ in range(len(prompt) + 1)]
    for i in range(len(prompt) - 1, floor - 1, -1):
        for j in range(len(ids) - 1, -1, -1):
            if prompt[i] == ids[j]:
                ahead[i][j] = ahead[i + 1][j + 1] + 1
    return [
        (i, i + ahead[i][j], j)
        for i in range(floor, len(prompt))
        for j in range(len(ids))
        if ahead[i][j] >= least and (i == floor or j == 0 or prompt[i - 1] != ids[j - 1])
    ]


def check_cover(matches: list[Match], segments: Sequence[Segment], prompt: list[int], least: int = 16) -> None:
    """Walk the cover that was found and check every step, and its end, against all runs that there are."""
    floor, unbroken = 0, True
    for match in [*matches, None]:
        found = [(run, s) for s in segments for run in runs(s, prompt, floor, least)]
        if match is None:
            assert not found, "known text was missed"
            return
        assert match.segment in segments
        assert match.segment.ids[match.offset : match.offset + match.tokens].tolist() == prompt[match.start : match.end]
        assert match.exact == is_exact(match.segment, match.offset, match.start, prompt)
        chain = [end for (start, end, j), s in found if start == floor and is_exact(s, j, start, prompt)] if unbroken else []
        if chain:
            assert (match.start, match.end, match.exact) == (floor, max(chain), True)
        else:
            first = min(start for (start, _, _), _ in found)
            pool = [(run, s) for run, s in found if run[0] < first + WINDOW]
            longest = max(end - start for (start, end, _), _ in pool)
            assert match.tokens == longest
            equal = [(run, s) for run, s in pool if run[1] - run[0] == longest]
            assert match.exact == any(is_exact(s, j, start, prompt) for (start, _, j), s in equal)
            assert match.start in [start for (start, _, _), _ in equal]
        unbroken = unbroken and match.exact and match.start == floor
        floor = match.end


PIECES = [
    text(seed, n, vocabulary).tolist() for seed, n, vocabulary in [(1, 3, 9), (2, 9, 9), (3, 16, 99), (4, 23, 99), (5, 40, 9)]
]
PIECES += [[7] * 20, [7, 8, 9] * 8]
pieces = st.lists(st.sampled_from(PIECES), min_size=2, max_size=6).map(
    lambda parts: [token for part in parts for token in part]
)


@st.composite
def known_segments(draw: st.DrawFn, prompt: list[int]) -> Segment:
    """A cut of a made-up text, or of the prompt itself so that exact runs are common."""
    whole = draw(st.sampled_from([prompt, draw(pieces)]))
    start = draw(st.sampled_from([0, *range(0, len(whole), 3)]))
    end = draw(st.integers(min(start + 15, len(whole)), len(whole)))
    return segment(whole[start:end], whole[:start], exact=draw(st.sampled_from([True, True, False])))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[int], list[Segment]]:
    prompt = draw(pieces)
    return prompt, draw(st.lists(known_segments(prompt), min_size=1, max_size=6, unique_by=lambda s: s.key))


@settings(max_examples=200, deadline=None)
@given(worlds())
def test_cover_is_the_quadratic_one(world: tuple[list[int], list[Segment]]) -> None:
    """`TextIndex.find` against the table of all pairs of positions: no run missed, invented or shorter than it could be."""
    prompt, segments = world
    index = TextIndex(variants=UNBOUNDED)
    for s in segments:
        index.add(s)
    index.check_integrity()
    check_cover(find(index, array(prompt)), segments, prompt)


@settings(max_examples=100, deadline=None)
@given(worlds(), st.data())
def test_bounded_index_stays_true_and_keeps_its_word(world: tuple[list[int], list[Segment]], data: st.DataObject) -> None:
    """With few places per window and few windows, after any order of adding and removing: matches are true, disjoint and of
    known segments, and the keys returned are exactly the ones that are gone."""
    prompt, segments = world
    index = TextIndex(
        max_windows=data.draw(st.integers(1, 12)),
        variants=data.draw(st.integers(1, 2)),
        max_bytes=data.draw(st.sampled_from([100, 400, 1 << 20])),
    )
    known: set[str] = set()
    for s in segments:
        if data.draw(st.booleans()):
            known = (known | {s.key}) - set(index.add(s))
        elif index.add_oldest(s):
            known.add(s.key)
        if data.draw(st.booleans()) and known:
            key = data.draw(st.sampled_from(sorted(known)))
            assert index.remove(key)
            assert not index.remove(key)
            known.remove(key)
        index.check_integrity()
        assert known == {s.key for s in segments if s.key in index}
        assert len(index) == len(known)
        assert index.windows <= index.max_windows
        assert index.nbytes <= index.max_bytes
    end = 0
    for match in find(index, array(prompt)):
        assert end <= match.start < match.end <= len(prompt)
        assert match.tokens >= index.min_run
        assert match.segment.key in known
        assert match.segment.ids[match.offset : match.offset + match.tokens].tolist() == prompt[match.start : match.end]
        assert match.exact == is_exact(match.segment, match.offset, match.start, prompt)
        end = match.end


# --- what is found ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(WINDOW))
@pytest.mark.parametrize("offset", range(WINDOW))
def test_a_run_of_sixteen_at_any_offset(at: int, offset: int) -> None:
    known = text(1, 60)
    prompt = np.concatenate([text(2, at), known[offset : offset + 16], text(3, 9)])
    (match,) = find(index_of(segment(known)), prompt)
    assert (match.start, match.end, match.offset, match.exact) == (at, at + 16, offset, at == offset == 0)


def test_fifteen_tokens_are_not_a_match() -> None:
    known = text(1, 60)
    assert not find(index_of(segment(known)), np.concatenate([text(2, 5), known[7:22], text(3, 9)]))


def test_neither_fingerprint_nor_tenant_is_crossed() -> None:
    known = text(1, 40)
    index = index_of(segment(known, fingerprint="f", tenant="a"), segment(known, fingerprint="g", tenant="b"))
    assert [len(find(index, known, f, t)) for f in "fg" for t in "ab"] == [1, 0, 0, 1]


def test_equal_hashes_do_not_make_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every hash equal, what is found is still decided by the token ids."""
    monkeypatch.setattr("kvcomm.matching._prefix_hashes", lambda ids: np.zeros(len(ids) + 1, dtype=np.uint64))
    known, other = text(1, 40), text(2, 80)
    index = index_of(segment(known, text(3, 4)), segment(known))
    assert not find(index, other)
    prompt = np.concatenate([other, known])
    check_cover(find(index, prompt), [m.segment for m in find(index, prompt)], prompt.tolist())
    assert [(m.start, m.tokens, m.exact) for m in find(index, prompt)] == [(80, 40, False)]


def test_small_ids_do_not_collide() -> None:
    """All windows of 8 tokens over the ids 0, 1 and 2 have hashes of their own."""
    from itertools import product

    from kvcomm.matching import _prefix_hashes, _window_hashes

    ids = array([token for window in product(range(3), repeat=WINDOW) for token in window])
    assert len(set(_window_hashes(_prefix_hashes(ids), np.arange(0, len(ids), WINDOW)).tolist())) == 3**WINDOW


# --- which of several contexts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("late", "wins"), [(7, True), (8, False)])
def test_the_longest_of_the_runs_that_start_within_a_window_wins(late: int, wins: bool) -> None:
    known = text(1, 100)
    early, longer = segment(known[:40], text(2, 3)), segment(known[late:], text(3, 9))
    found = find(index_of(early, longer), known)
    assert [m.start for m in found] == ([late] if wins else [0, 40])


def test_of_several_exact_prefixes_the_longest_wins() -> None:
    known = text(1, 100)
    segments = [segment(known[:60]), segment(known[:100]), segment(known[:80])]
    assert [m.segment for m in find(index_of(*segments), known)] == [segments[1]]


def test_a_text_that_repeats_itself_displaces_no_other_context() -> None:
    line, header = text(1, 16), text(2, 20)
    near = segment(line, header, exact=False)
    index = index_of(near, segment(np.tile(line, 30), exact=False), variants=2)
    assert [m.segment for m in find(index, np.concatenate([text(3, 5), header, line]))] == [near]


def test_no_run_is_exact_under_other_rotary_tables() -> None:
    """Of two equal prefixes the one with this prompt's tables is taken, in any order; the other is never exact."""
    known = text(1, 60)
    short, long = (Segment(known, array([]), "f", length=length) for length in (1, 100))
    assert short.key != long.key
    for segments in ([short, long], [long, short]):
        found = index_of(*segments).find(known, fingerprint="f", same_tables=lambda length: length == 100)
        assert [(m.segment, m.exact) for m in found] == [(long, True)]
    (match,) = index_of(short).find(known, fingerprint="f", same_tables=lambda length: length == 100)
    assert (match.tokens, match.exact) == (60, False)


def test_an_exact_prefix_wins_over_a_longer_run_and_the_longer_run_goes_on_behind_it() -> None:
    known = text(1, 100)
    exact, longer = segment(known[:40]), segment(known, text(2, 30))
    found = find(index_of(exact, longer), known)
    assert [(m.start, m.end, m.segment, m.exact) for m in found] == [(0, 40, exact, True), (40, 100, longer, False)]


def test_exact_prefixes_are_found_however_many_contexts_share_the_text() -> None:
    """Thirty agents read one text, each behind a role of its own and as a segment of its own; two places per window."""
    shared, roles = text(1, 64), [text(10 + agent, 24) for agent in range(30)]
    index = index_of(*(s for role in roles for s in (segment(role), segment(shared, role))), variants=2)
    for role in roles:
        found = find(index, np.concatenate([role, shared]))
        assert [(m.start, m.end, m.exact) for m in found] == [(0, 24, True), (24, 88, True)]


def test_after_a_gap_an_equal_run_that_is_exact_wins() -> None:
    head, unknown, known = text(1, 32), text(2, 10), text(3, 50)
    exact = segment(known, np.concatenate([head, unknown]))
    approximate = segment(known, np.concatenate([head, unknown]), exact=False)
    found = find(index_of(segment(head), exact, approximate), np.concatenate([head, unknown, known]))
    assert [(m.start, m.segment.key, m.exact) for m in found[1:]] == [(42, exact.key, True)]


def test_behind_a_gap_length_counts_again() -> None:
    prompt = text(1, 200)
    behind_gap = [segment(prompt[60:100], prompt[:60]), segment(prompt[100:140], prompt[:100])]
    longer = segment(prompt[100:200], text(2, 9))
    found = find(index_of(segment(prompt[:40]), *behind_gap, longer), prompt)
    assert [(m.start, m.end, m.exact) for m in found] == [(0, 40, True), (60, 100, True), (100, 200, False)]


@pytest.mark.parametrize("newest", [0, 1, 2])
def test_the_nearest_context_wins(newest: int) -> None:
    """Of three equal runs: header in front as in the prompt, an unrelated header, and the header far away only."""
    known, header, filler = text(1, 50), text(2, 12), text(3, 100)
    near = segment(known, np.concatenate([text(4, 60), header]))
    foreign = segment(known, np.concatenate([text(5, 60), text(6, 12)]))
    far = segment(known, np.concatenate([header, text(7, 60)]))
    segments = [near, foreign, far]
    segments.append(segments.pop(newest))
    prompt = np.concatenate([filler, header, known])
    (match,) = find(index_of(*segments), prompt)
    assert match.segment is near
    index = index_of(*(s for s in segments if s is not near))
    assert find(index, prompt)[0].segment is far


def test_nearness_sees_a_header_shorter_than_a_window() -> None:
    known, filler = text(1, 50), text(3, 40)
    same, other = segment(known, [*text(4, 20), 11, 12]), segment(known, [*text(5, 20), 11, 13])
    for order in ([same, other], [other, same]):
        assert find(index_of(*order), np.concatenate([filler, array([11, 12]), known]))[0].segment is same


def test_nearness_looks_into_the_segment_before_the_run() -> None:
    """The run stands in the middle of both segments; what is in front of it there is what counts."""
    known, header = text(1, 50), text(2, 9)
    same = segment([*text(3, 40), *header, 5, *known])
    other = segment([*text(4, 40), *text(5, 9), 5, *known])
    prompt = np.concatenate([text(6, 30), header, array([6]), known])
    for order in ([same, other], [other, same]):
        assert find(index_of(*order), prompt)[0].segment is same


def nearness(before: list[int], prompt: list[int]) -> float:
    """The documented measure, token by token; `before` is the segment's text before the run, `prompt` the prompt's."""
    windows = {tuple(prompt[i : i + WINDOW]) for i in range(len(prompt) - WINDOW + 1)}
    tail = before[-128:]

    def common(i: int) -> bool:
        if tail[i:] == prompt[len(prompt) - len(tail) + i :] and len(tail) - i <= len(prompt):
            return True
        covering = range(max(i - WINDOW + 1, 0), min(i, len(tail) - WINDOW) + 1)
        return any(tuple(tail[j : j + WINDOW]) in windows for j in covering)

    weights = [1 / (d + 8) for d in range(max(len(tail), min(len(prompt), 128), 1))]
    return sum(weights[len(tail) - 1 - i] for i in range(len(tail)) if common(i)) / sum(weights)


@settings(max_examples=60, deadline=None)
@given(pieces, st.lists(pieces, min_size=2, max_size=4), st.lists(st.integers(0, 150), min_size=4, max_size=4))
def test_the_chosen_context_is_the_nearest_by_its_definition(
    front: list[int], others: list[list[int]], cuts: list[int]
) -> None:
    """Equal runs behind cuts of the prompt's own text and other texts, partly inside the segment: `nearness` decides."""
    known = text(99, 30)
    befores = [other + front[cut:] for other, cut in zip(others, cuts, strict=False)]
    segments = {}
    for before, cut in zip(befores, reversed(cuts), strict=False):
        inside = min(cut // 4, len(before))
        ids = [*before[len(before) - inside :], 77_777, *known] if inside else [*known]
        s = segment(ids, before[: len(before) - inside], exact=False)
        segments[s.key] = (s, [*before, 77_777] if inside else before)
    prompt = [*front, 88_888]
    index = index_of(*(s for s, _ in segments.values()))
    (match,) = (m for m in find(index, array([*prompt, *known])) if m.end == len(prompt) + 30)
    if match.tokens == 30:
        best = max(nearness(before, prompt) for _, before in segments.values())
        assert nearness(segments[match.segment.key][1], prompt) == pytest.approx(best)


# --- bounds -----------------------------------------------------------------------------------------------------------------


def test_without_some_segments_the_others_are_found() -> None:
    known = text(1, 60)
    a, b = segment(known), segment(known, text(2, 30))
    index = index_of(a, b)
    for without, seen in (([], a), ([a.key], b), ([b.key], a)):
        (match,) = index.find(known, fingerprint="f", without=without)
        assert match.segment == seen
        assert (match.start, match.end, match.exact) == (0, 60, seen is a)
    assert index.find(known, fingerprint="f", without=[a.key, b.key]) == []


def test_the_oldest_leave_and_are_named() -> None:
    a, b, c = (segment(text(seed, 80)) for seed in range(3))
    index = TextIndex(max_windows=20)
    assert index.add(a) == index.add(b) == ()
    assert index.add(a) == ()  # known already: now the newest
    assert index.add(c) == (b.key,)
    assert [s.key in index for s in (a, b, c)] == [True, False, True]
    index.check_integrity()


@pytest.mark.parametrize("limit", [{"max_windows": 60}, {"max_bytes": 60 * 8 * 4}])
def test_who_has_most_makes_room(limit: dict[str, int]) -> None:
    """Whatever one tenant adds, another one keeps its share."""
    index = TextIndex(**limit)
    mine = [segment(text(seed, 80), tenant="small") for seed in range(2)]
    for s in mine:
        assert index.add(s) == ()
    theirs = [segment(text(10 + seed, 80), tenant="large", fingerprint=f"f{seed}") for seed in range(10)]
    lost = [key for s in theirs for key in index.add(s)]
    assert lost == [s.key for s in theirs[:6]]
    assert all(s.key in index for s in mine)
    index.check_integrity()


def test_for_the_oldest_nobody_leaves() -> None:
    a, b, c, d = (segment(text(seed, 80)) for seed in range(4))
    index = TextIndex(max_windows=30)
    assert index.add(a) == ()
    assert [index.add_oldest(s) for s in (b, b, c, d)] == [True, True, True, False]
    assert [index.has_room(s) for s in (d, segment(text(4, 8)))] == [False, False]
    assert [index.add(s) for s in (d, segment(text(5, 80)), segment(text(6, 80)))] == [(c.key,), (b.key,), (a.key,)]
    index.check_integrity()


def test_the_oldest_takes_no_place_from_others() -> None:
    known = text(1, 40)
    newer, older = ([segment(known, text(n + i, 5), exact=False) for i in range(2)] for n in (10, 20))
    index = TextIndex(variants=2)
    assert [*map(index.add, newer)] == [(), ()]
    assert not index.add_oldest(older[0])
    assert index.remove(newer[0].key)
    assert [*map(index.add_oldest, older)] == [True, False]
    assert [m.segment for m in find(index, known)] == [newer[1]], "of equals, the newest is found"
    assert index.add(newer[0]) == (older[0].key,)
    index.check_integrity()


def test_contexts_count_and_the_oldest_leave() -> None:
    """40 tokens behind 100 others: 560 bytes each."""
    a, b, c = (segment(text(seed, 40), text(10 + seed, 100)) for seed in range(3))
    index = TextIndex(max_bytes=1_200)
    assert index.add(a) == index.add(b) == ()
    assert index.nbytes == 1_120
    assert index.add(c) == (a.key,)
    assert index.remove(b.key)
    assert index.nbytes == 560
    large = segment(text(4, 40), text(5, 300))
    assert index.add(large) == (large.key,)
    assert c.key in index
    index.check_integrity()


def test_what_cannot_be_indexed_is_named() -> None:
    index = TextIndex(max_windows=4)
    short, large = segment(text(1, 15)), segment(text(2, 40))
    assert index.add(short) == (short.key,)
    assert index.add(large) == (large.key,)
    assert len(index) == index.windows == 0
    assert index.add(segment([])) == (segment([]).key,)


def test_a_segment_that_lost_every_place_is_named() -> None:
    known = text(1, 40)
    variants = [segment(known, text(10 + i, 5)) for i in range(3)]
    index = TextIndex(variants=2)
    assert [index.add(s) for s in variants] == [(), (), ()]  # all are exact: they can still be found as prefixes
    approximate = [segment(known, text(20 + i, 5), exact=False) for i in range(3)]
    index = TextIndex(variants=2)
    assert [index.add(s) for s in approximate] == [(), (), (approximate[0].key,)]
    index.check_integrity()


def test_bad_bounds_are_refused() -> None:
    for options in ({"min_run": 14}, {"max_windows": 0}, {"variants": 0}, {"max_bytes": 0}):
        with pytest.raises(InputError, match=r"\d"):
            TextIndex(**options)


def test_empty_and_short_prompts() -> None:
    index = index_of(segment(text(1, 40)))
    assert find(index, array([])) == find(index, text(1, 40)[:15]) == find(TextIndex(), text(1, 40)) == []


# --- cost -------------------------------------------------------------------------------------------------------------------


def periodic(tokens: int) -> tuple[list[Segment], Ids]:
    known = np.tile(array([1, 2, 3]), tokens)[:tokens]
    return [segment(known, text(i, 9), exact=False) for i in range(5)], known[1:]


def one_token(tokens: int) -> tuple[list[Segment], Ids]:
    known = np.full(tokens, 7, dtype=np.int32)
    return [segment(known, text(i, 9)) for i in range(5)], known


def exact_chain(tokens: int) -> tuple[list[Segment], Ids]:
    """One token throughout, known as many short exact segments and as long ones from elsewhere."""
    known = np.full(tokens, 7, dtype=np.int32)
    chain = [segment(known[i : i + 200], known[:i]) for i in range(0, tokens, 200)]
    return [*chain, *(segment(known, text(i, 9)) for i in range(5))], known


def shuffled_windows(tokens: int) -> tuple[list[Segment], Ids]:
    """Every window of the prompt is known, in eight segments, and no run is long enough."""
    chunks = text(1, tokens).reshape(-1, WINDOW)
    orders = [np.random.default_rng(seed).permutation(len(chunks)) for seed in range(8)]
    return [segment(chunks[order].ravel()) for order in orders], np.insert(chunks, 0, 3, axis=1).ravel()


def staggered(tokens: int) -> tuple[list[Segment], Ids]:
    """From every 5th position on, the rest of the prompt is known behind another context."""
    known = text(1, tokens)
    return [segment(known[i:], text(i, 9)) for i in range(0, min(tokens, 200), 5)], np.concatenate([text(2, 3), known])


@pytest.mark.parametrize("world", [periodic, one_token, exact_chain, shuffled_windows, staggered])
def test_cost_is_linear_in_the_prompt(world: type) -> None:
    """Token comparisons per prompt token, at three sizes: bounded by a constant far below the limit that ends a search, and
    the search does its work (everything known is found, up to the places that a window keeps)."""
    for tokens in (2_000, 6_000, 18_000):
        segments, prompt = world(tokens)
        index = TextIndex()
        for s in segments:
            index.add(s)
        covered = sum(match.tokens for match in find(index, prompt))
        assert index.compared <= 200 * len(prompt), (tokens, index.compared / len(prompt))
        if world is shuffled_windows:
            assert covered == 0
        else:
            assert covered >= 0.98 * len(prompt)


def test_a_search_that_costs_too_much_ends_with_true_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcomm.matching.WORK", 1)
    segments, prompt = exact_chain(4_000)
    index = index_of(*segments)
    found = find(index, prompt)
    assert 0 < sum(match.tokens for match in found) < len(prompt)
    assert index.compared < 50 * len(prompt)
    assert all(is_exact(m.segment, m.offset, m.start, prompt.tolist()) for m in found if m.exact)
