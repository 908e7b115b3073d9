"""Successive halving: how questions are split, how many a round asks, and what is kept."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from d3tom_export.cost.pareto_figure import front
from d3tom_export.quality.search import FINALISTS, better_half, rounds, split

POINTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=40)


@settings(deadline=None)
@given(st.integers(2, 400), st.integers(0, 9), st.floats(0.01, 0.99))
def test_questions_are_split_once_and_seeded(count: int, seed: int, share: float) -> None:
    search, check = split(count, seed, share)
    assert search
    assert check
    assert sorted(search + check) == list(range(count))
    assert (search, check) == split(count, seed, share)
    assert abs(len(check) - count * share) <= 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.integers(0, 9), st.floats(0.01, 0.99))
def test_questions_of_a_group_are_in_one_part(groups: list[int], seed: int, share: float) -> None:
    search, check = split(len(groups), seed, share, groups)
    assert search
    assert check
    assert sorted(search + check) == list(range(len(groups)))
    if len(set(groups)) > 1:
        assert not {groups[at] for at in search} & {groups[at] for at in check}
    else:
        assert (search, check) == split(len(groups), seed, share)
    own = [10 * at for at in range(len(groups))]
    assert split(len(groups), seed, share, own) == split(len(groups), seed, share)


def test_seeds_split_differently() -> None:
    assert split(100, 0, 0.5) != split(100, 1, 0.5)


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(2, 500))
def test_rounds_double_up_to_all_questions(candidates: int, questions: int) -> None:
    counts = rounds(candidates, questions)
    assert counts[-1] == questions
    assert counts == sorted(set(counts))
    assert counts[0] >= min(4, questions)
    assert all(later <= 2 * earlier for earlier, later in pairwise(counts))
    for _ in counts[1:]:
        candidates = max(-(-candidates // 2), min(FINALISTS, candidates))
    assert candidates <= FINALISTS or counts[0] <= 4


def test_rounds_of_a_usual_search() -> None:
    assert rounds(96, 128) == [8, 16, 32, 64, 128]
    assert rounds(6, 128) == [128]
    assert rounds(96, 8) == [4, 8]


@settings(deadline=None)
@given(POINTS)
def test_the_better_half_has_the_cheapest_and_the_best(points: list[tuple[float, float]]) -> None:
    kept = better_half(range(len(points)), points)
    assert len(kept) == max(-(-len(points) // 2), min(FINALISTS, len(points)))
    assert kept == sorted(set(kept))
    whole = front(points)
    assert whole[-1] in kept  # the best there is
    if len(points) > FINALISTS:
        assert whole[0] in kept  # the cheapest


@settings(deadline=None)
@given(st.integers(2 * FINALISTS, 60))
def test_where_all_tie_every_cost_stays(count: int) -> None:
    """Few questions tell nothing apart: neither the cheap nor the dear are all dropped."""
    kept = better_half(range(count), [(float(at), 1.0) for at in range(count)])
    assert kept[: len(kept) // 2] == list(range(len(kept) // 2))
    gaps = [later - earlier for earlier, later in pairwise([*kept, count])]
    assert max(gaps) <= -(-count // (FINALISTS // 2))
