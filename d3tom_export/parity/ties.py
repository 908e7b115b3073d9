"""How open to doubt a decision was that two float32 runtimes made differently. Imports no framework."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from d3tom_export.loop.denoise import StepRecord

NEAR_TIE = 1e-5
"""A decision whose two candidates differ by less, relative to the larger, is a near-tie: float32 sums in another
order may turn it."""


def relative_gap(a: float, b: float) -> float:
    """Difference of two scores, confidences or logits, relative to the larger of their sizes."""
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def kept_gap(found: NDArray[np.int64], expected: NDArray[np.int64], scores: NDArray[np.float32]) -> float:
    """Largest relative difference of score between tokens that changed places across the cut.

    It is infinite where they are not as many, or ``found`` names a token that is not there.
    """
    gained, lost = np.setdiff1d(found, expected), np.setdiff1d(expected, found)
    if len(gained) != len(lost) or not len(gained) or gained[0] < 0 or gained[-1] >= len(scores):
        return float("inf")
    return relative_gap(float(scores[lost].max()), float(scores[gained].min()))


def confidence_gap(record: StepRecord, expected: NDArray[np.bool_], row: int) -> float:
    """How open to doubt it was which positions were committed: between two candidates, or between one and its rule.

    ``expected`` (G,) bool are those that the reference committed, against ``row`` of ``record``. Positions that an end
    token took along follow from it, and are no decision of their own.
    """
    followed = np.zeros_like(expected) if record.filled is None else record.filled[row]
    gained = record.transfer[row] & ~expected & ~followed
    lost = expected & ~record.transfer[row]
    gap, result = float("inf"), record.result
    confidence = (result.confidence if result.certainty is None else result.certainty)[row]
    if gained.any() and lost.any():
        gap = relative_gap(float(confidence[gained].min()), float(confidence[lost].max()))
    if record.slack is not None and (gained | lost).any():
        by_rule = np.abs(record.slack[row][gained | lost])
        gap = min(gap, float("inf") if np.isnan(by_rule).any() else float(by_rule.max()))
    return gap


def token_gap(record: StepRecord, expected: NDArray[np.int64], logits: NDArray[np.float32], row: int) -> float:
    """How open to doubt the first token was that is another in ``row`` of ``record``: its logit against the other's.

    ``expected`` (G,) int64 are the tokens committed, ``logits`` (G, rows of the head) the reference's.
    """
    position = int(np.flatnonzero(record.tokens[row] != expected)[0])
    there = logits[position]
    return relative_gap(float(there[record.tokens[row][position]]), float(there[expected[position]]))
