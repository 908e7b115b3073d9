"""Which token each masked position takes, and how sure it is: float64 on the host, as released (lavida.md D4).

B batch, G answer tokens, R rows of the language head. Imports no framework but NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import Certainty, Choices, GenerationConfig

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
    """Noise for each row of a batch from a generator of its own, seeded with the row's of ``seeds``.

    ``stream`` keeps independent uses (token sampling, selection of visual tokens) apart.
    """

    def __init__(self, seeds: Sequence[int], stream: int) -> None:
        self._generators = [np.random.default_rng([seed, stream]) for seed in seeds]

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


def without_banned(logits: NDArray[np.floating], choices: Choices | None) -> NDArray[np.floating]:
    """``logits`` (B, G, R) with -infinity in the banned columns of ``choices``; themselves where there are none."""
    if choices is None or not choices.banned:
        return logits
    logits = logits.copy()
    logits[..., list(choices.banned)] = -np.inf
    return logits


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
    logits: NDArray[np.floating], greedy: Ints, temperature: float, noise: RowNoise, rows: int | None = None
) -> Ints:
    """Tokens (B, G) drawn in proportion to softmax(``logits`` (B, G, R) / ``temperature``), as released.

    Of the first ``rows`` columns (None: all); ``greedy`` (B, G) has the likeliest of them. Noise is drawn for all
    columns, as released. Equal seeds draw equal tokens, on every backend.
    """
    batch, count, columns = logits.shape
    races_of_rows = noise.races(count, columns)
    tokens = logits[..., :rows]
    drawn = [
        [_sample(tokens[row, place], int(greedy[row, place]), temperature, race) for place, race in enumerate(races)]
        for row, races in enumerate(races_of_rows)
    ]
    return np.array(drawn, dtype=np.int64).reshape(batch, count)


def certainty_of(certainty: Certainty, rest: NDArray[np.floating], other: NDArray[np.floating] | None) -> Floats:
    """The certainty of each position among all tokens, from what stage `certainty` says.

    ``rest``, and `runner_up` or `rest_entropy` as ``other`` (of a probability nothing). margin: p1 - p2; entropy:
    sum p log(p + 1e-10), which is negative. (B, G) float64.
    """
    rest = rest.astype(np.float64)
    largest = 1.0 / (1.0 + rest)
    if certainty.kind == "probability":
        return _rounded(largest, certainty)
    assert other is not None
    other = other.astype(np.float64)
    if certainty.kind == "entropy":
        return _rounded(largest * np.log1p(ENTROPY_EPSILON - rest * largest) - other, certainty)
    if certainty.single:
        return _rounded(_rounded(largest, certainty) - _rounded(other * largest, certainty), certainty)
    return np.asarray((1.0 - other) * largest)


def certainty_of_likeliest(certainty: Certainty, likeliest: NDArray[np.floating], rest: NDArray[np.floating]) -> Floats:
    """The certainty of each position among its likeliest tokens: (B, G) float64.

    Args:
        certainty: With a ``top_k`` of at most K, or with a ``top_p`` and K columns that are all there are.
        likeliest: (B, G, K), the largest probabilities, relative to the largest of all, descending.
        rest: (B, G), the sum of all others than the largest, relative to it.

    Cut first by ``top_p`` and then by ``top_k``, and renormalised (Dream's ``sample_tokens``; spec-lavida-dream.md, 6).
    """
    kept = likeliest[..., : certainty.top_k].astype(np.float64)
    if certainty.top_p is not None:
        reached = np.cumsum(kept / (1.0 + rest.astype(np.float64))[..., None], axis=-1) > certainty.top_p
        kept[..., 1:][reached[..., :-1]] = 0.0  # the first always stays
    probabilities = _rounded(kept / kept.sum(axis=-1, keepdims=True), certainty)
    return _certainty_of_probabilities(certainty, probabilities)


def certainty_of_logits(certainty: Certainty, logits: NDArray[np.floating]) -> Floats:
    """The same from the logits (B, G, R) themselves, banned ones at -infinity."""
    if not certainty.whole:
        relative = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
        count = logits.shape[-1] if certainty.top_k is None else min(certainty.top_k, logits.shape[-1])
        likeliest = np.sort(np.partition(relative, -count, axis=-1)[..., -count:], axis=-1)[..., ::-1]
        return certainty_of_likeliest(certainty, likeliest, relative.sum(axis=-1) - 1.0)
    return _certainty_of_probabilities(certainty, _rounded(softmax64(logits), certainty))


def _certainty_of_probabilities(certainty: Certainty, probabilities: Floats) -> Floats:
    """The same from probabilities (B, G, K) in any order."""
    if certainty.kind == "entropy":
        return _rounded((probabilities * np.log(probabilities + ENTROPY_EPSILON)).sum(axis=-1), certainty)
    if certainty.kind == "probability" or probabilities.shape[-1] < 2:
        return np.asarray(probabilities.max(axis=-1))
    top_two = np.partition(probabilities, -2, axis=-1)[..., -2:]
    return _rounded(top_two[..., 1] - top_two[..., 0], certainty)


def _rounded(values: NDArray[np.floating], certainty: Certainty) -> Floats:
    return (values.astype(np.float32) if certainty.single else values).astype(np.float64)


def cut(logits: NDArray[np.floating], top_k: int | None, top_p: float | None) -> NDArray[np.floating]:
    """``logits`` (B, G, R) with -infinity in the columns that ``top_p`` and then ``top_k`` leave out."""
    if top_p is not None and top_p < 1:
        order = np.argsort(-logits, axis=-1, kind="stable")
        reached = np.cumsum(softmax64(np.take_along_axis(logits, order, axis=-1)), axis=-1) > top_p
        left_out = np.zeros_like(reached)
        np.put_along_axis(left_out, order[..., 1:], reached[..., :-1], axis=-1)
        logits = np.where(left_out, -np.inf, logits)
    if top_k is not None and top_k < logits.shape[-1]:
        least = np.partition(logits, -top_k, axis=-1)[..., -top_k, None]
        logits = np.where(logits < least, -np.inf, logits)
    return logits


def choose(
    greedy: Choice,
    certainty: Floats | None,
    logits: NDArray[np.floating] | None,
    generation: GenerationConfig,
    noise: RowNoise,
    choices: Choices | None = None,
) -> Choice:
    """Token and confidence of every answer position.

    Args:
        greedy: The likeliest tokens, and their probabilities.
        certainty: (B, G) float64, what ``generation.certainty`` asks for, where no tokens are sampled.
        logits: (B, G, R), where tokens are sampled.
        generation: How they are sampled and ranked.
        noise: Where noise comes from.
        choices: Which columns of the logits are tokens (None: all); the release stops with an IndexError where it
            chooses another.

    LLaDA ranks by all columns, without noise: probability of the chosen token, margin, negative entropy, or uniform
    noise. Dream by the distribution that it draws from (``generation.rank_drawn``).
    """
    token, confidence = greedy.token, greedy.confidence
    if generation.temperature > 0:
        assert logits is not None
        logits, rows = without_banned(logits, choices), None if choices is None else choices.rows
        if generation.rank_drawn:
            logits = cut(logits / generation.temperature, generation.top_k, generation.top_p)
            token = sample_tokens(logits, greedy.token, 1.0, noise, rows)
            certainty = _certainty_of_drawn(token, logits, generation)
        else:
            token = sample_tokens(logits, greedy.token, generation.temperature, noise, rows)
            own, likeliest = (_at(logits, each).astype(np.float64) for each in (token, greedy.token))
            confidence = confidence * np.exp(own - likeliest)
    if generation.remasking == "random":
        return Choice(token, noise.uniform(token.shape[1]))
    return Choice(token, confidence if certainty is None else certainty)


def _at(values: NDArray[np.floating], token: Ints) -> NDArray[np.floating]:
    """The columns ``token`` (B, G) of ``values`` (B, G, R): (B, G)."""
    return np.take_along_axis(values, token[..., None], axis=-1)[..., 0]


def _certainty_of_drawn(token: Ints, logits: NDArray[np.floating], generation: GenerationConfig) -> Floats | None:
    """The certainty by the distribution that ``token`` was drawn from, whose scaled and cut ``logits`` these are."""
    certainty = generation.certainty
    if certainty is None:
        return None
    if certainty.kind == "probability":
        return _rounded(_at(softmax64(logits), token).astype(np.float64), certainty)
    return certainty_of_logits(replace(certainty, top_k=None, top_p=None), logits)


def commit(confidence: Floats, eligible: NDArray[np.bool_], counts: Ints) -> NDArray[np.bool_]:
    """The most confident ``eligible`` positions of each row, as many as its ``counts`` (B,): (B, G) bool.

    Ties go to the lower position.
    """
    ranked = np.argsort(-np.where(eligible, confidence, -np.inf), axis=-1, kind="stable")
    transfer = np.zeros_like(eligible)
    np.put_along_axis(transfer, ranked, np.arange(ranked.shape[1]) < counts[:, None], axis=-1)
    return transfer & eligible
