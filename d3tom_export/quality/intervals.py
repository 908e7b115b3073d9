"""What of a difference between two sets of scores is more than chance: paired bootstrap, sign flips. NumPy only.

Both sets score the same n questions. Questions are drawn with replacement, both scores of a question together; what the
draws give, from their 2.5th to their 97.5th percentile, is the 95 % interval. Few questions make such intervals too
short, down to a point where no score differs, and of many comparisons one in twenty leaves 0 out by chance. So a
difference counts as seen only where the sign-flip test of the mean agrees, at 5 % for all comparisons of a table
together (Holm). Where questions share pictures, they are drawn and flipped by groups: together, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Seen = Literal["none", "lower", "higher"]
"""Whether a difference was seen, and which way."""

DRAWS = 10_000
LEVEL = 0.05
LOSSES = 0.8
"""Share of a level that is spent on how many questions may have got worse; the rest on how many got better."""
_ELEMENTS = 1 << 22
"""Indices that are held at once: 32 MiB."""
_SAME = 1e-9
"""Differences that are roundings."""


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


class Comparison(NamedTuple):
    """Scores against those of a reference, question by question."""

    retention: float | None
    """Mean over the reference's; None where that is 0."""
    retention_interval: Interval | None
    """Its upper end is infinite where draws without any score of the reference's are more than 2.5 %."""
    difference: float
    """Mean minus the reference's."""
    difference_interval: Interval
    p: float
    """Two-sided, of :func:`sign_flips`: how likely so large a mean difference is by chance."""
    lowest: float | None
    """What retention is at least, one-sided: the lower of the bootstrap's end and of what so many questions can show
    (:func:`net_loss`); None where it is."""


def units(groups: Sequence[int] | None, count: int) -> NDArray[np.intp] | None:
    """The groups (n,) that ``count`` questions are in, numbered as they come; None where each stands for itself.

    So it does where none shares its group, and where all share one: what is found holds for that picture alone then.
    """
    if groups is None:
        return None
    _, first, inverse = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    if len(first) in (1, count):
        return None
    places = np.empty(len(first), dtype=np.intp)
    places[np.argsort(first)] = np.arange(len(first))
    return places[inverse]


def units_in(groups: Sequence[int] | None, count: int) -> int:
    """How many things that were drawn by themselves ``count`` questions are (:func:`units`)."""
    found = units(groups, count)
    return count if found is None else int(found.max()) + 1


def _draws(columns: Scores, seed: int, draws: int, groups: NDArray[np.intp] | None) -> Scores:
    """Means (draws, k) of ``columns`` (n, k) over samples of n rows, or of as many groups; equal seeds draw the same.

    A sample of groups has the mean over all rows in it.
    """
    if groups is not None:
        columns = np.column_stack([columns, np.ones(len(columns))])
        columns = np.stack([np.bincount(groups, column) for column in columns.T], axis=1)
    count = len(columns)
    generator = np.random.default_rng(seed)
    step = max(1, _ELEMENTS // max(count, 1))
    means = []
    for start in range(0, draws, step):
        rows = generator.integers(0, count, size=(min(step, draws - start), count))
        found = columns[rows].mean(axis=1)
        means.append(found if groups is None else found[:, :-1] / found[:, -1:])
    return np.concatenate(means)


def _low(values: Scores, share: float) -> float:
    # Of sorted values themselves, not between two: infinities have no middle.
    return float(np.sort(values)[math.floor(share * (len(values) - 1))])


def _percentiles(values: Scores) -> Interval:
    values = np.sort(values)
    last = len(values) - 1
    return Interval(float(values[math.floor(0.025 * last)]), float(values[math.ceil(0.975 * last)]))


def mean_interval(scores: Scores, seed: int = 0, draws: int = DRAWS, groups: Sequence[int] | None = None) -> Interval:
    """Of the mean of ``scores`` (n,), of questions in ``groups`` (n,)."""
    return _percentiles(_draws(scores[:, None], seed, draws, units(groups, len(scores)))[:, 0])


def effective_count(right: Scores, groups: Sequence[int] | None = None) -> float:
    """Of how many questions by themselves ``right`` (n,) of 0 and 1 tell as much; at most n, fewer in groups (Kish)."""
    count, share, found = len(right), float(right.mean()), units(groups, len(right))
    if found is None:
        return float(count)
    spread = count * share * (1.0 - share)
    if spread == 0.0:
        return float(found.max() + 1)
    return count / max(1.0, float((np.bincount(found, right - share) ** 2).sum()) / spread)


def sign_test(reference: Scores, scores: Scores) -> float:
    """Two-sided p of how many questions are better and how many worse, both (n,): McNemar's exact test, of 0 and 1."""
    better, worse = int((scores > reference).sum()), int((scores < reference).sum())
    return _split(better, worse)


def _split(better: int, worse: int) -> float:
    differing = better + worse
    tail = sum(math.comb(differing, count) for count in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**differing)


def sign_flips(
    reference: Scores, scores: Scores, seed: int = 0, draws: int = DRAWS, groups: Sequence[int] | None = None
) -> float:
    """Two-sided p of the mean difference of ``scores`` from ``reference``, both (n,): paired, by flipping signs.

    Were it chance, each question's difference, or that of all questions of a group together, had been as likely the
    other way round. Where all that differ do so by as much, as one question a picture scored 0 or 1 does, that is the
    exact sign test; else signs are drawn, and p is (as extreme draws + 1) / (draws + 1).
    """
    found = units(groups, len(scores))
    differences = scores - reference if found is None else np.bincount(found, scores - reference)
    sizes = np.sort(np.abs(differences[np.abs(differences) > _SAME]))  # sorted: p is the same in any order
    if not len(sizes) or sizes[-1] - sizes[0] < _SAME:
        return _split(int((differences > _SAME).sum()), int((differences < -_SAME).sum()))
    generator, reached, extreme = np.random.default_rng((seed, 1)), abs(float(differences.sum())), 0
    step = max(1, _ELEMENTS // len(sizes))
    for start in range(0, draws, step):
        signs = generator.integers(0, 2, size=(min(step, draws - start), len(sizes)), dtype=np.int8)
        sums = 2.0 * (signs @ sizes) - sizes.sum()
        extreme += int((np.abs(sums) >= reached - _SAME).sum())
    return (extreme + 1) / (draws + 1)


def _share_at(found: int, count: int, chance: float) -> float:
    """The share of which ``found`` or fewer of ``count`` are so likely, by halving."""
    if found < 0 or found >= count:
        return 0.0 if found < 0 else 1.0
    least = np.arange(found + 1)
    ways = np.array([-math.lgamma(at + 1) - math.lgamma(count - at + 1) for at in least]) + math.lgamma(count + 1)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        logs = ways + least * math.log(middle) + (count - least) * math.log1p(-middle)
        low, high = (middle, high) if float(np.exp(logs).sum()) > chance else (low, middle)
    return high


def net_loss(worse: int, better: int, count: int, level: float = LEVEL) -> float:
    """The largest loss, losses less gains over all questions, that ``worse`` and ``better`` of ``count`` bear out.

    Exact, for any number of either (Clopper and Pearson, one-sided): the upper bound of losses at :data:`LOSSES` of
    ``level`` less the lower bound of gains at the rest of it.
    """
    most = _share_at(worse, count, LOSSES * level)
    return most - _share_at(better - 1, count, 1.0 - (1.0 - LOSSES) * level)


def compare(
    reference: Scores,
    scores: Scores,
    seed: int = 0,
    draws: int = DRAWS,
    groups: Sequence[int] | None = None,
    level: float = LEVEL,
) -> Comparison:
    """``scores`` against ``reference``, both (n,) from 0 to 1, of the same questions in the same order.

    Questions of one of ``groups`` (n,) are drawn, and their differences flipped, together. ``level`` is that of the
    lowest retention.
    """
    means = _draws(np.stack([reference, scores], axis=1), seed, draws, units(groups, len(scores)))
    base, own = means[:, 0], means[:, 1]
    whole = float(reference.mean())
    retention = interval = lowest = None
    if whole > 0:
        retention = float(scores.mean()) / whole
        some = base > 0
        ratios = np.divide(own, base, out=np.zeros_like(own), where=some)
        # A draw without any right answer of the reference's says nothing: it counts against either end.
        interval = Interval(_percentiles(ratios).low, _percentiles(np.where(some, ratios, np.inf)).high)
        count = units_in(groups, len(scores))
        # Of groups so many losses as would be as large a share of them; parts of a loss add up, and are rounded up.
        lost, gained = (
            count * float(np.maximum(change, 0.0).mean()) for change in (reference - scores, scores - reference)
        )
        loss = net_loss(math.ceil(lost - _SAME), math.floor(gained + _SAME), count, level)
        lowest = max(0.0, min(_low(ratios, level), 1.0 - loss / whole))
    return Comparison(
        retention,
        interval,
        float(scores.mean()) - whole,
        _percentiles(own - base),
        sign_flips(reference, scores, seed, draws, groups),
        lowest,
    )


def unseen_loss(count: int, level: float = LEVEL) -> float:
    """The largest share of questions that a setting may get wrong and yet, of ``count``, change none at this level."""
    return 1.0 - level ** (1 / count)


def holm(ps: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which of several tests are significant while the chance of any false one stays below ``level`` (Holm 1979)."""
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    found = [False] * len(ps)
    for rank, index in enumerate(order):
        if ps[index] > level / (len(ps) - rank):
            break
        found[index] = True
    return found


def seen(comparisons: Sequence[Comparison], level: float = LEVEL) -> list[Seen]:
    """For each of a table's comparisons whether a difference was seen: by its interval, and by sign flips (Holm)."""
    significant = holm([each.p for each in comparisons], level)
    return [
        "none" if not agrees or each.difference_interval.holds(0.0) else "lower" if each.difference < 0 else "higher"
        for each, agrees in zip(comparisons, significant, strict=True)
    ]
