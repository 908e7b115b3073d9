"""The statistics: properties that any data must show, and how often they are right where the truth is known."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3tom_export.quality import intervals
from d3tom_export.quality.intervals import (
    Comparison,
    Interval,
    compare,
    effective_count,
    holm,
    mean_interval,
    net_loss,
    seen,
    sign_flips,
    sign_test,
    units,
    units_in,
    unseen_loss,
)

DRAWS = 400
PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=30)


def _columns(pairs: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs)
    return table[:, 0], table[:, 1]


@settings(deadline=None)
@given(PAIRS, st.integers(0, 5))
def test_comparisons_of_any_scores(pairs: list[tuple[float, float]], seed: int) -> None:
    reference, scores = _columns(pairs)
    found = compare(reference, scores, seed, DRAWS)
    assert found == compare(reference, scores, seed, DRAWS)
    low, high = found.difference_interval
    assert -1 <= low <= high <= 1
    assert found.difference == pytest.approx(scores.mean() - reference.mean())
    assert (found.retention is None) == (reference.sum() == 0)
    if found.retention is not None:
        assert found.retention_interval is not None
        assert 0 <= found.retention_interval.low <= found.retention_interval.high
    assert 0 < found.p <= 1
    # The other way round, differences change their sign and nothing else.
    back = compare(scores, reference, seed, DRAWS)
    assert back.difference == pytest.approx(-found.difference)
    assert back.difference_interval == pytest.approx((-high, -low))
    assert back.p == found.p


@settings(deadline=None)
@given(PAIRS)
def test_equal_scores_have_no_difference(pairs: list[tuple[float, float]]) -> None:
    scores, _ = _columns(pairs)
    same = compare(scores, scores, draws=DRAWS)
    assert (same.difference, same.difference_interval, same.p) == (0.0, Interval(0.0, 0.0), 1.0)
    assert seen([same]) == ["none"]
    if same.retention_interval is not None:
        assert same.retention == 1.0
        assert same.retention_interval.low <= 1.0 <= same.retention_interval.high


@settings(deadline=None)
@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_questions_is_nothing_to_what_is_certain(pairs: list[tuple[float, float]], chance: Random) -> None:
    shuffled = list(pairs)
    chance.shuffle(shuffled)
    one, other = compare(*_columns(pairs), draws=DRAWS), compare(*_columns(shuffled), draws=DRAWS)
    assert one.difference == pytest.approx(other.difference)
    assert one.p == other.p


def test_a_reference_that_is_rarely_right_leaves_the_upper_end_open() -> None:
    reference, scores = np.array([1.0, *[0.0] * 9]), np.array([1.0, 1.0, *[0.0] * 8])
    found = compare(reference, scores)
    assert found.retention == 2.0
    assert found.retention_interval is not None
    assert found.retention_interval.low == 0.0  # a third of the draws has no right answer of the reference's
    assert math.isinf(found.retention_interval.high)
    assert compare(np.zeros(4), scores[:4]).retention is None


def test_the_sign_test_is_mcnemars() -> None:
    def split(better: int, worse: int, same: int = 3) -> float:
        pairs = [(0.0, 1.0)] * better + [(1.0, 0.0)] * worse + [(1.0, 1.0)] * same
        return sign_test(*_columns(pairs))

    assert split(0, 5) == pytest.approx(2 / 32)
    assert split(0, 6) == split(6, 0) == pytest.approx(2 / 64)
    assert split(3, 9) == pytest.approx(2 * (1 + 12 + 66 + 220) / 4096)
    assert split(4, 4) == 1.0
    assert split(0, 0) == 1.0


def test_few_questions_show_nothing() -> None:
    """Four gains of nine leave 0 out of a bootstrap's interval; the sign test knows better."""
    gains = compare(np.array([0.0] * 4 + [1.0] * 5), np.ones(9))
    assert gains.difference_interval.low > 0
    assert gains.p == 0.125
    assert seen([gains]) == ["none"]


def test_what_is_seen() -> None:
    reference = np.ones(40)
    worse = compare(reference, np.array([0.0] * 12 + [1.0] * 28))
    better = compare(1 - reference, np.array([1.0] * 12 + [0.0] * 28))
    none = compare(reference, np.array([0.0] + [1.0] * 39))
    assert seen([worse, none, better]) == ["lower", "none", "higher"]
    assert seen([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_rejects_no_more_than_single_tests_and_no_fewer_than_bonferroni(ps: list[float]) -> None:
    found = holm(ps, 0.05)
    for p, rejected in zip(ps, found, strict=True):
        assert not rejected or p <= 0.05
        assert rejected or p > 0.05 / len(ps)
    rejected = [p for p, reject in zip(ps, found, strict=True) if reject]
    assert all(p >= max(rejected, default=0) for p, reject in zip(ps, found, strict=True) if not reject)
    assert holm([0.01, 0.03, 0.04]) == [True, False, False]
    assert holm([0.04, 0.01, 0.02]) == [True, True, True]


def test_noise_is_not_reported_as_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of eight comparisons of pure chance: at most one in twenty tells of any difference."""
    chance, told, tables = np.random.default_rng(0), 0, 120
    for _ in range(tables):
        reference = (chance.random(60) < 0.7).astype(float)
        comparisons = []
        for _ in range(8):
            turned = chance.random(60) < 0.25
            comparisons.append(compare(reference, np.where(turned, chance.random(60) < 0.7, reference), draws=DRAWS))
        told += any(verdict != "none" for verdict in seen(comparisons))
    assert told <= 0.05 * tables


def test_intervals_hold_the_truth() -> None:
    """95 % intervals of retention, of the difference and of a mean, at 120 questions: nearly so often right."""
    chance, held, trials = np.random.default_rng(1), np.zeros(3), 300
    base, kept, gained = 0.8, 0.9, 0.1  # chances: the reference is right, what was right stays so, what was wrong is
    truth = base * kept + (1 - base) * gained
    for _ in range(trials):
        reference = chance.random(120) < base
        scores = np.where(reference, chance.random(120) < kept, chance.random(120) < gained).astype(float)
        found = compare(reference.astype(float), scores, draws=DRAWS)
        assert found.retention_interval is not None
        mean = mean_interval(scores, draws=DRAWS)
        held += [
            found.retention_interval.holds(truth / base),
            found.difference_interval.holds(truth - base),
            mean.holds(truth),
        ]
    assert (held / trials > 0.91).all(), held / trials
    assert (held / trials < 0.99).all(), held / trials


def test_many_questions_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, scores = _columns([(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)] * 5)
    whole = compare(reference, scores, draws=100)
    monkeypatch.setattr(intervals, "_ELEMENTS", 70)
    pieces = compare(reference, scores, draws=100)
    assert pieces == whole  # a generator's stream does not depend on how it is cut


def test_what_a_number_of_questions_cannot_show() -> None:
    assert unseen_loss(1) == pytest.approx(0.95)
    assert unseen_loss(59) == pytest.approx(0.0495, abs=1e-3)  # the rule of three
    assert isinstance(compare(np.ones(2), np.ones(2), draws=10), Comparison)


def _uneven(chance: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Differences of mean 0: six in ten a little worse, one in ten much better."""
    drawn = chance.random(shape)
    return np.where(drawn < 0.6, -0.08, np.where(drawn < 0.7, 0.48, 0.0))


def test_uneven_noise_is_not_reported_as_a_gain() -> None:
    """Where the truth is no difference of means, the sign test of medians finds one, and flipped signs do not."""
    chance, trials = np.random.default_rng(3), 300
    reference = np.full(400, 0.5)
    tables = [reference + _uneven(chance, (400,)) for _ in range(trials)]
    medians = sum(sign_test(reference, scores) <= 0.05 for scores in tables)
    means = sum(sign_flips(reference, scores, draws=DRAWS) <= 0.05 for scores in tables)
    assert medians == trials
    assert means <= 0.07 * trials


def test_a_difference_goes_the_way_of_the_mean() -> None:
    """Sixty of a hundred a little worse and twenty much better: higher, by what the mean says."""
    reference = np.full(100, 0.5)
    scores = reference + np.array([-0.01] * 60 + [0.5] * 20 + [0.0] * 20)
    found = compare(reference, scores, draws=DRAWS)
    assert found.difference > 0
    assert found.p < 0.05
    assert seen([found]) == ["higher"]
    few = compare(reference, reference + np.array([-0.01] * 60 + [0.5] * 2 + [0.0] * 38), draws=DRAWS)
    assert few.difference > 0
    assert few.p > 0.05 > sign_test(reference, reference + np.array([-0.01] * 60 + [0.5] * 2 + [0.0] * 38))
    assert seen([few]) == ["none"]


def test_flips_of_equal_sizes_are_the_sign_test() -> None:
    chance = np.random.default_rng(5)
    reference, scores = (chance.random(50) < 0.6).astype(float), (chance.random(50) < 0.8).astype(float)
    assert sign_flips(reference, scores) == sign_test(reference, scores)
    assert sign_flips(reference, reference) == 1.0
    uneven = reference.copy()
    uneven[:9] = 0.4
    assert sign_flips(reference, uneven, 1) == sign_flips(reference, uneven, 1)
    assert 0 < sign_flips(reference, uneven) <= 1


def test_bounds_are_clopper_and_pearsons() -> None:
    """One-sided, four fifths of the level for what got worse, the rest for what got better."""
    for level in (0.05, 0.01):
        most = net_loss(0, 0, 300, level)
        assert most == pytest.approx(1 - (0.8 * level) ** (1 / 300))
        assert most == pytest.approx(unseen_loss(300, 0.8 * level))
    assert net_loss(1, 0, 10, 0.0625) == pytest.approx(0.39416, abs=1e-4)  # the 95 % bound of 1 in 10
    assert net_loss(10, 0, 10) == 1.0
    assert net_loss(0, 10, 10) < 0
    losses = [net_loss(worse, 0, 50) for worse in range(51)]
    assert losses == sorted(set(losses))
    gains = [net_loss(3, better, 50) for better in range(48)]
    assert gains == sorted(gains, reverse=True)


def test_the_lowest_retention_is_rarely_above_the_truth() -> None:
    """Few losses, where a bootstrap alone says too much: one-sided, so at most one in twenty is wrong."""
    chance, trials, wrong, alone = np.random.default_rng(2), 300, 0, 0
    for _ in range(trials):
        scores = (chance.random(200) >= 0.01).astype(float)
        found = compare(np.ones(200), scores, draws=DRAWS)
        assert found.lowest is not None
        assert found.retention_interval is not None
        wrong += found.lowest > 0.99
        alone += found.retention_interval.low > 0.99
    assert alone > 0.05 * trials
    assert wrong <= 0.05 * trials


def test_one_answer_worse_is_seen_in_the_lowest_retention() -> None:
    scores = np.ones(300)
    unchanged = compare(np.ones(300), scores, draws=DRAWS)
    scores[0] = 0.0
    worse = compare(np.ones(300), scores, draws=DRAWS)
    assert unchanged.lowest == pytest.approx(0.04 ** (1 / 300))
    assert worse.lowest is not None
    assert worse.lowest < 0.985
    partly = compare(np.ones(300), np.where(scores == 0, 0.9, 1.0), draws=DRAWS)
    assert partly.lowest == worse.lowest  # what is lost of answers is rounded up


def test_groups_are_drawn_and_flipped_together() -> None:
    """Ten questions a picture that all say the same are as good as one."""
    chance = np.random.default_rng(4)
    one, other = (chance.random(40) < 0.7).astype(float), (chance.random(40) < 0.5).astype(float)
    single = compare(one, other, draws=DRAWS)
    groups = [at // 10 for at in range(400)]
    repeated = compare(one.repeat(10), other.repeat(10), draws=DRAWS, groups=groups)
    assert repeated.difference_interval == pytest.approx(single.difference_interval)
    assert repeated.retention_interval == pytest.approx(single.retention_interval)
    assert repeated.p == single.p
    assert repeated.lowest == pytest.approx(single.lowest)
    naive = compare(one.repeat(10), other.repeat(10), draws=DRAWS)
    assert naive.p < single.p
    assert mean_interval(one.repeat(10), draws=DRAWS, groups=groups) == pytest.approx(mean_interval(one, draws=DRAWS))
    assert effective_count(one.repeat(10), groups) == pytest.approx(40)
    assert effective_count(one, range(40)) == effective_count(one) == 40


def test_one_question_a_picture_is_as_without_groups() -> None:
    one, other = _columns([(1.0, 1.0), (1.0, 0.0), (0.5, 1.0), (1.0, 0.25)] * 5)
    plain = compare(one, other, 3, DRAWS)
    assert compare(one, other, 3, DRAWS, [7 * at for at in range(20)]) == plain
    assert compare(one, other, 3, DRAWS, [1] * 20) == plain  # of one picture alone
    assert units([5, 5, 2, 5], 4).tolist() == [0, 0, 1, 0]  # type: ignore[union-attr]
    assert (units_in([5, 5, 2, 5], 4), units_in(None, 4), units_in([1, 1], 2)) == (2, 4, 2)


def test_intervals_of_groups_hold_the_truth() -> None:
    """Five questions a picture that mostly go together: intervals of questions alone would be too short."""
    chance, trials, held, naive = np.random.default_rng(6), 200, 0, 0
    groups = [at // 5 for at in range(300)]
    for _ in range(trials):
        lost = (chance.random(60) < 0.2).repeat(5) & (chance.random(300) < 0.8)
        scores = np.where(lost, 0.0, 1.0)
        held += compare(np.ones(300), scores, draws=DRAWS, groups=groups).difference_interval.holds(-0.16)
        naive += compare(np.ones(300), scores, draws=DRAWS).difference_interval.holds(-0.16)
    assert held > 0.9 * trials
    assert naive < 0.8 * trials
