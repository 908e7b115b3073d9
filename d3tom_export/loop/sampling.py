"""Which token each masked position takes, and how sure it is: float64 on the host, as released (lavida.md D4).

B batch, G answer tokens, R rows of the language head. Imports no framework but NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import Certainty, GenerationConfig

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ENTROPY_EPSILON = 1e-10
"""What the release adds to probabilities before it takes their logarithms."""

_RACERS = 1024
"""Columns of a position whose noise is drawn one by one (:class:`Race`)."""


@dataclass(frozen=True)
class Choice:
    """``token`` (B, G) int64 and the ``confidence`` (B, G) float64 that ranks positions for committing."""

    token: Ints
    confidence: Floats


class RowNoise:
    """Noise for each row of a batch from a generator of its own, seeded with ``seed + row``.

    ``stream`` keeps independent uses (token sampling, selection of visual tokens) apart.
    """

    def __init__(self, seed: int, rows: int, stream: int) -> None:
        self._generators = [np.random.default_rng([seed + row, stream]) for row in range(rows)]

    def uniform(self, *shape: int) -> Floats:
        """Uniform values in [0, 1), shape (rows, *shape)."""
        return np.stack([generator.random(shape) for generator in self._generators])

    def races(self, count: int, columns: int) -> list[list[Race]]:
        """Exponential noise for ``count`` positions of each row, over ``columns`` each."""
        return [[Race(generator, columns) for _ in range(count)] for generator in self._generators]


class Race:
    """Standard exponential noise, independent, for every one of ``columns``; most of it is never worked out.

    Of independent exponentials the smallest few can be drawn by themselves: their gaps are exponentials too, and who
    has them is a random choice. The others are larger than these by independent exponentials again, which a hash of
    their column gives. So each column has its noise, whichever are asked for, and two backends whose logits differ in
    the last bit meet the same.
    """

    def __init__(self, generator: np.random.Generator, columns: int) -> None:
        racers = min(_RACERS, columns)
        drawn = generator.choice(columns, racers, replace=False)
        times = np.cumsum(generator.standard_exponential(racers) / np.arange(columns, columns - racers, -1))
        order = np.argsort(drawn)
        self.columns: Ints = drawn[order]
        """(K,) those with the smallest noise, ascending."""
        self.times: Floats = times[order]
        """(K,) their noise."""
        self.latest = float(times[-1])
        """The largest of it: that of any other column is larger."""
        self._key = generator.integers(0, 2**64, dtype=np.uint64)

    def of(self, columns: Ints) -> Floats:
        """The noise of ``columns`` (n,), any."""
        mixed = columns.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + self._key
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        times = self.latest - np.log1p((mixed >> np.uint64(11)).astype(np.float64) * -(2.0**-53))
        place = np.searchsorted(self.columns, columns).clip(max=len(self.columns) - 1)
        return np.where(self.columns[place] == columns, self.times[place], times)


def softmax64(logits: NDArray[np.floating]) -> Floats:
    """Softmax over the last axis in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted


def _sample(logits: NDArray[np.floating], greedy: int, temperature: float, race: Race) -> int:
    """Gumbel-max sampling: the largest of exp(logits) / noise ** temperature over the columns of ``logits`` (R,).

    In logarithms, which do not overflow. A column outside the race's drawn ones has more noise than the last of them,
    so only where its logit makes up for that can it win: all others are passed over by one comparison.
    """

    def best(columns: Ints, times: Floats) -> tuple[float, int]:
        with np.errstate(divide="ignore"):
            scores = logits[columns].astype(np.float64) - temperature * np.log(times)
        first = int(scores.argmax())
        return float(scores[first]), int(columns[first])

    likeliest, inside = np.array([greedy]), race.columns < len(logits)
    found = best(likeliest, race.of(likeliest))
    if inside.any():
        found = max(found, best(race.columns[inside], race.times[inside]))
    least = np.nextafter(np.float32(found[0] + temperature * np.log(race.latest)), np.float32(-np.inf))
    others = np.flatnonzero(logits >= least)
    return max(found, best(others, race.of(others)))[1] if len(others) else found[1]


def sample_tokens(
    logits: NDArray[np.floating], greedy: Ints, temperature: float, noise: RowNoise, vocab_rows: int | None = None
) -> Ints:
    """Tokens (B, G) drawn in proportion to softmax(``logits`` (B, G, R) / ``temperature``), as released.

    Of the first ``vocab_rows`` columns (None: all); ``greedy`` (B, G) has the likeliest of them. Noise is drawn for all
    columns, as released. Equal seeds draw equal tokens, on every backend.
    """
    batch, count, columns = logits.shape
    rows = noise.races(count, columns)
    tokens = logits[..., :vocab_rows]
    drawn = [
        [_sample(tokens[row, place], int(greedy[row, place]), temperature, race) for place, race in enumerate(races)]
        for row, races in enumerate(rows)
    ]
    return np.array(drawn, dtype=np.int64).reshape(batch, count)


def certainty_of(kind: Certainty, rest: NDArray[np.floating], other: NDArray[np.floating]) -> Floats:
    """The certainty of each position from what stage `certainty` says: ``rest``, and `runner_up` or `rest_entropy`.

    margin: p1 - p2; entropy: sum p log(p + 1e-10), which is negative. (B, G) float64.
    """
    rest, other = rest.astype(np.float64), other.astype(np.float64)
    largest = 1.0 / (1.0 + rest)
    if kind == "margin":
        return (1.0 - other) * largest
    return largest * np.log1p(ENTROPY_EPSILON - rest * largest) - other


def certainty_of_logits(kind: Certainty, logits: NDArray[np.floating]) -> Floats:
    """The same from the logits (B, G, R) themselves, of all columns."""
    probabilities = softmax64(logits)
    if kind == "margin":
        top_two = np.partition(probabilities, -2, axis=-1)[..., -2:]
        return np.asarray(top_two[..., 1] - top_two[..., 0])
    return np.asarray((probabilities * np.log(probabilities + ENTROPY_EPSILON)).sum(axis=-1))


def choose(
    greedy: Choice,
    certainty: Floats | None,
    logits: NDArray[np.floating] | None,
    generation: GenerationConfig,
    noise: RowNoise,
    vocab_rows: int | None = None,
) -> Choice:
    """Token and confidence of every answer position.

    Args:
        greedy: The likeliest tokens, and their probabilities.
        certainty: (B, G) float64, where positions are ranked by margin or entropy.
        logits: (B, G, R), where tokens are sampled.
        generation: How they are sampled and ranked.
        noise: Where noise comes from.
        vocab_rows: How many columns of the logits are tokens (None: all); the release stops with an IndexError where it
            chooses another.

    The confidence comes from all columns, without noise: probability of the chosen token, margin, negative entropy, or
    uniform noise.
    """
    token, confidence = greedy.token, greedy.confidence
    if generation.temperature > 0:
        assert logits is not None
        token = sample_tokens(logits, greedy.token, generation.temperature, noise, vocab_rows)
        own, likeliest = (
            np.take_along_axis(logits, each[..., None], axis=-1)[..., 0].astype(np.float64)
            for each in (token, greedy.token)
        )
        confidence = confidence * np.exp(own - likeliest)
    if generation.remasking == "random":
        return Choice(token, noise.uniform(token.shape[1]))
    return Choice(token, confidence if certainty is None else certainty)


def commit(confidence: Floats, eligible: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """The ``count`` most confident ``eligible`` positions of each row: (B, G) bool. Ties go to the lower position."""
    ranked = np.argsort(-np.where(eligible, confidence, -np.inf), axis=-1, kind="stable")
    transfer = np.zeros_like(eligible)
    np.put_along_axis(transfer, ranked[:, :count], True, axis=-1)
    return transfer & eligible
