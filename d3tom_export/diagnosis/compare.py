"""One value of a backend against the same value in PyTorch: how far apart they are, and how far they may be.

Fails closed: a missing value, another shape or kind, and anything that is not finite are departures.
Imports no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STAGE_TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 2e-1}
"""Largest relative error (:func:`relative_error`) of a whole stage by the precision it runs in. float32 has 6e-8 a
rounding; measured over the stages of the tested models a few 1e-6, and a few 1e-5 through softmaxes as sharp as those
of random weights. Half precisions have 5e-4 and 4e-3 a rounding and as much room above it."""

LAYER_TOLERANCE = {"fp32": 2e-5, "fp16": 6e-3, "bf16": 4e-2}
"""The same of one layer or module that is given the reference's own input: nothing adds up, so it may err less."""

TIED_SIMILARITY = {"fp32": 5e-7, "fp16": 4e-3, "bf16": 3e-2}
"""Differences of cosine similarity that rounding may turn, by precision: eight units in the last place below 1. A token
whose two most similar kept tokens differ by less may join either."""

TIED_DECISION = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 1.5e-1}
"""The same for scores that decide who is kept, and for logits, relative to the larger."""

SENSITIVE = dict.fromkeys(("confidence", "doubt", "rest", "runner_up", "rest_entropy"), 50.0)
"""Outputs that may err by so many times the tolerance. They are exponentials of differences of logits, so an error e
of the logits is one of about 2e in them, however large the logits are: tens, where their own scale is 1."""


@dataclass(frozen=True)
class Difference:
    """How far a value is from the reference's."""

    error: float
    """Largest relative error; infinite where the two do not compare at all."""
    largest: float
    """Largest absolute difference; infinite where the two do not compare at all."""
    tolerance: float
    problem: str | None = None
    """Why the two do not compare."""

    @property
    def departs(self) -> bool:
        return not self.error <= self.tolerance


def relative_error(found: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """|found - reference| / (|reference| + rms of the reference), element by element.

    The scale is the larger of the element's own and the tensor's: outlier channels are judged by their own size, and
    elements near zero by their neighbours'.
    """
    wanted = reference.astype(np.float64)
    rms = float(np.sqrt(np.mean(wanted**2))) if wanted.size else 0.0
    return np.abs(found.astype(np.float64) - wanted) / (np.abs(wanted) + rms + 1e-30)


def _misfit(found: NDArray[Any] | None, reference: NDArray[Any]) -> str | None:
    if found is None:
        return "it is missing"
    if found.shape != reference.shape:
        return f"its shape is {found.shape}, expected {reference.shape}"
    if found.dtype.kind != reference.dtype.kind:
        return f"its dtype is {found.dtype}, expected {reference.dtype}"
    if reference.dtype.kind == "f":
        if not np.isfinite(reference).all():
            return "PyTorch's own value is not finite: the weights themselves overflow"
        broken = int((~np.isfinite(found)).sum())
        if broken:
            return f"{broken} of {found.size} elements are NaN or infinite"
    return None


def compare(
    found: NDArray[Any] | None,
    reference: NDArray[Any],
    tolerance: float,
    alternatives: Sequence[NDArray[Any]] = (),
    exempt: NDArray[np.bool_] | None = None,
) -> Difference:
    """``found`` against ``reference``; integers and booleans must be equal.

    ``alternatives`` are as right as the reference, row (last axis) by row: each row is held to the nearest of them.
    Rows that are ``exempt`` only have to be finite.
    """
    problem = _misfit(found, reference)
    if problem is not None:
        return Difference(np.inf, np.inf, tolerance, problem)
    assert found is not None
    if reference.dtype.kind != "f":
        wrong = int((found != reference).sum())
        problem = f"{wrong} of {found.size} elements differ" if wrong else None
        return Difference(np.inf if wrong else 0.0, np.inf if wrong else 0.0, tolerance, problem)
    if not found.size:
        return Difference(0.0, 0.0, tolerance)
    errors, largest = relative_error(found, reference), np.abs(found.astype(np.float64) - reference)
    for other in alternatives:
        rows = relative_error(found, other).max(axis=-1, keepdims=True)
        nearer = rows < errors.max(axis=-1, keepdims=True)
        errors = np.where(nearer, rows, errors)
        largest = np.where(nearer, np.abs(found.astype(np.float64) - other), largest)
    if exempt is not None:
        errors, largest = errors[~exempt], largest[~exempt]
    return Difference(float(errors.max(initial=0.0)), float(largest.max(initial=0.0)), tolerance)
