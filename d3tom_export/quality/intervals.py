"""What of a difference between two sets of scores is more than chance: paired bootstrap, sign test. NumPy only.

Both sets score the same n questions. Questions are drawn with replacement, both scores of a question together; what the
draws give, from their 2.5th to their 97.5th percentile, is the 95 % interval. Few questions make such intervals too
short, down to a point where no score differs, and of many comparisons one in twenty leaves 0 out by chance. So a
difference counts as seen only where the exact sign test over the questions whose scores differ agrees, at 5 % for all
comparisons of a table together (Holm).
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
_ELEMENTS = 1 << 22
"""Indices that are held at once: 32 MiB."""


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
    """Of the two-sided sign test: how likely so uneven a split of better and worse is by chance."""


def _draws(count: int, seed: int, draws: int, columns: Scores) -> Scores:
    """Means (draws, k) of ``columns`` (n, k) over ``draws`` samples of n rows; equal seeds draw the same rows."""
    generator = np.random.default_rng(seed)
    step = max(1, _ELEMENTS // max(count, 1))
    means = []
    for start in range(0, draws, step):
        rows = generator.integers(0, count, size=(min(step, draws - start), count))
        means.append(columns[rows].mean(axis=1))
    return np.concatenate(means)


def _percentiles(values: Scores) -> Interval:
    # Of sorted values themselves, not between two: infinities have no middle.
    values = np.sort(values)
    last = len(values) - 1
    return Interval(float(values[math.floor(0.025 * last)]), float(values[math.ceil(0.975 * last)]))


def mean_interval(scores: Scores, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Of the mean of ``scores`` (n,)."""
    return _percentiles(_draws(len(scores), seed, draws, scores[:, None])[:, 0])


def sign_test(reference: Scores, scores: Scores) -> float:
    """Two-sided p of how many questions are better and how many worse, both (n,): McNemar's exact test, of 0 and 1."""
    better, worse = int((scores > reference).sum()), int((scores < reference).sum())
    return _split(better, worse)


def _split(better: int, worse: int) -> float:
    differing = better + worse
    tail = sum(math.comb(differing, count) for count in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**differing)


def compare(reference: Scores, scores: Scores, seed: int = 0, draws: int = DRAWS) -> Comparison:
    """``scores`` against ``reference``, both (n,) from 0 to 1, of the same questions in the same order."""
    means = _draws(len(scores), seed, draws, np.stack([reference, scores], axis=1))
    base, own = means[:, 0], means[:, 1]
    whole = float(reference.mean())
    retention = interval = None
    if whole > 0:
        retention = float(scores.mean()) / whole
        some = base > 0
        ratios = np.divide(own, base, out=np.zeros_like(own), where=some)
        # A draw without any right answer of the reference's says nothing: it counts against either end.
        low = _percentiles(ratios).low
        interval = Interval(low, _percentiles(np.where(some, ratios, np.inf)).high)
    return Comparison(
        retention,
        interval,
        float(scores.mean()) - whole,
        _percentiles(own - base),
        sign_test(reference, scores),
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
    """For each of a table's comparisons whether a difference was seen: by its interval, and by the sign test (Holm)."""
    significant = holm([each.p for each in comparisons], level)
    return [
        "none" if not agrees or each.difference_interval.holds(0.0) else "lower" if each.difference < 0 else "higher"
        for each, agrees in zip(comparisons, significant, strict=True)
    ]
