"""Which token each masked position takes, and how sure it is: float64 on the host, as released (lavida.md D4).

B batch, G answer tokens, R rows of the language head. Imports no framework but NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import GenerationConfig

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """``token`` (B, G) int64 and the ``confidence`` (B, G) float64 that ranks positions for committing."""

    token: Ints
    confidence: Floats


class RowNoise:
    """Uniform noise for each row of a batch from a generator of its own, seeded with ``seed + row``.

    ``stream`` keeps independent uses (token sampling, selection of visual tokens) apart.
    """

    def __init__(self, seed: int, rows: int, stream: int) -> None:
        self._generators = [np.random.default_rng([seed + row, stream]) for row in range(rows)]

    def uniform(self, *shape: int) -> Floats:
        """Uniform values in [0, 1), shape (rows, *shape)."""
        return np.stack([generator.random(shape) for generator in self._generators])


def softmax64(logits: NDArray[np.floating]) -> Floats:
    """Softmax over the last axis in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted


def gumbel_argmax(logits: NDArray[np.floating], temperature: float, uniform: Floats) -> Ints:
    """Gumbel-max sampling as released: argmax of exp(logits) / (-log u) ** temperature, in float64."""
    with np.errstate(divide="ignore", over="ignore"):
        noisy = np.exp(logits.astype(np.float64)) / (-np.log(uniform)) ** temperature
    return noisy.argmax(axis=-1)


def choose(
    logits: NDArray[np.floating], generation: GenerationConfig, noise: RowNoise, vocab_rows: int | None = None
) -> Choice:
    """Token and confidence of every answer position from its ``logits`` (B, G, R).

    Only the first ``vocab_rows`` columns are tokens that may be chosen (None: all); the release stops with an
    IndexError where it chooses another. The confidence comes from all columns, without noise: probability of the chosen
    token, difference of the two largest probabilities, negative entropy, or uniform noise.
    """
    tokens = logits[..., :vocab_rows]
    if generation.temperature > 0:
        uniform = noise.uniform(*logits.shape[1:])  # drawn for all columns, as released
        token = gumbel_argmax(tokens, generation.temperature, uniform[..., :vocab_rows])
    else:
        token = tokens.argmax(axis=-1)
    if generation.remasking == "random":
        return Choice(token, noise.uniform(logits.shape[1]))
    probabilities = softmax64(logits)
    if generation.remasking == "margin":
        top_two = np.partition(probabilities, -2, axis=-1)[..., -2:]
        return Choice(token, top_two[..., 1] - top_two[..., 0])
    if generation.remasking == "entropy":
        return Choice(token, (probabilities * np.log(probabilities + 1e-10)).sum(axis=-1))
    return Choice(token, np.take_along_axis(probabilities, token[..., None], axis=-1)[..., 0])


def commit(confidence: Floats, eligible: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """The ``count`` most confident ``eligible`` positions of each row: (B, G) bool. Ties go to the lower position."""
    ranked = np.argsort(-np.where(eligible, confidence, -np.inf), axis=-1, kind="stable")
    transfer = np.zeros_like(eligible)
    np.put_along_axis(transfer, ranked[:, :count], True, axis=-1)
    return transfer & eligible
