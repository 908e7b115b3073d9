"""How far a backend in low precision may be from PyTorch: bounds that follow from what the precision itself resolves.

PyTorch runs every step twice: as the oracle the backend is compared with, and as its *witness*, the same weights with
the roundings left out (of int8: put in). How far these two are apart is what the precision costs on this model and on
these very steps. A backend rounds elsewhere and in another order, so it is as far from the oracle as the witness is, or
a little more; a wrong one is not near. Imports no framework.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")

FACTOR = 3.0
"""How many times as far from the oracle as the witness a backend may be. Between two right ones lie both of their
roundings: twice the distance if they round alike, three times if the backend rounds twice as much as PyTorch does.
Measured on the bundled model: sums split in two, each half rounded, are 1.3 to 1.5 times as far; ONNX Runtime's int8
graphs 0.97 to 1.04 times (docs/diagnosis.md)."""

UNIT = {"fp16": 2.0**-10, "bf16": 2.0**-7, "int8": 2.0**-7, "fp32": 2.0**-7}
"""Relative spacing of neighbouring numbers (of int8, of the largest): what one rounding may turn. A witness may be
nearer to the oracle than that by luck, so one unit is added to bounds of typical errors, two to those of the worst.

float32 is bounded so only where products round their inputs to float8. Its numbers are 2 ** -3 apart, but a backend
rounds as the oracle does, and only what lies next to a boundary goes the other way: int8's unit does."""

_EXACT_EMBEDDINGS = ("int8", "fp32")
"""Precisions that leave embeddings in float32."""

HIGHEST = 0.5
"""No bound is above this, whatever the precision does to the model: 1.0 is the error of a tensor of zeros."""

FLIP_FACTOR = 2.0
"""How many of a merge's tokens may have gone elsewhere in one step, each with the effect that the closest call has in
PyTorch: whether a token joins one of two equally similar ones is rounding's to decide, and moves all logits a bit."""

INT8_AGREEMENT = 0.99
"""Share of the masked positions, over all steps of all answers, at which int8 must choose float32's token."""

EMBEDDING_TOLERANCE = 1e-4
"""Largest difference of embeddings that are computed in float32, relative to the largest: prompts' and pictures'."""


@dataclass(frozen=True)
class Bound:
    """One figure of a comparison and the largest that passes."""

    name: str
    where: str
    """The loop, where there are several."""
    found: float
    """Also the smallest bound that would have passed; infinite or NaN where nothing compared."""
    allowed: float
    resolved: float | None = None
    """What the precision itself does to the figure: the witness's, from which ``allowed`` follows."""

    @property
    def holds(self) -> bool:
        return bool(np.isfinite(self.allowed) and self.found <= self.allowed)

    def to_json(self) -> dict[str, Any]:
        numbers = {"found": self.found, "allowed": self.allowed, "resolved": self.resolved}
        # JSON knows no NaN or infinity; null, and a bound that does not hold, stand for them.
        finite = {
            name: number if number is not None and np.isfinite(number) else None for name, number in numbers.items()
        }
        return {"name": self.name, "where": self.where, **finite, "holds": self.holds}

    def __str__(self) -> str:
        of = "" if self.resolved is None else f", the precision itself {self.resolved:.1e}"
        return f"{self.found:.1e} (allowed {self.allowed:.1e}{of})"


def relative_difference(found: NDArray[Any], expected: NDArray[Any], scale: float | None = None) -> float:
    """The largest difference relative to the largest expected number, or to ``scale``; infinite if they do not compare.

    Empty arrays do not differ.
    """
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    if not expected.size:
        return 0.0
    largest = float(np.abs(expected).max()) if scale is None else scale
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    return float(difference) / max(largest, float(np.finfo(np.float32).tiny))


def rms_difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The root mean square of the difference relative to that of ``expected``; infinite if they do not compare."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    wanted = expected.astype(np.float64)
    return float(np.sqrt(((found.astype(np.float64) - wanted) ** 2).mean() / max((wanted**2).mean(), 1e-60)))


def log_odds(confidence: NDArray[np.float64], surest: float = 1e-4) -> NDArray[np.float64]:
    """log(c / (1 - c)), of a confidence held to 1e-4 .. 1 - 1e-4, beyond which half precisions give 0 or 1.

    Logits that are all off by at most e move it by at most 2 e. ``surest`` is another limit than 1e-4.
    """
    held = np.clip(confidence, surest, 1 - surest)
    return np.asarray(np.log(held / (1 - held)))


def score_difference(scores: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """How far the importance of visual tokens is off, relative to the larger, at all but one in twenty of them."""
    larger = np.maximum(np.maximum(np.abs(scores), np.abs(others)), 1e-30)
    return float(np.quantile(np.abs(scores.astype(np.float64) - others) / larger, 0.95))


@dataclass
class Distances:
    """How far one side is from the oracle, step by step and prompt by prompt; all relative."""

    logits: list[float] = field(default_factory=list)
    """Largest difference of each step, relative to its largest logit."""
    logits_rms: list[float] = field(default_factory=list)
    unmerged_rms: list[float] = field(default_factory=list)
    """Of the steps that merge nothing, the first of every answer among them."""
    scores: list[float] = field(default_factory=list)
    """See :func:`score_difference`; of the witness only."""
    flips: list[float] = field(default_factory=list)
    """What one token of the merge does to the logits by going elsewhere; of the witness only."""
    margins: list[float] = field(default_factory=list)
    """Margin in float32 of each token that differs, as the error of logits that would turn it."""
    confidence: list[float] = field(default_factory=list)
    """Largest difference of a step, as the error of logits that would make it."""
    kept: list[float] = field(default_factory=list)
    """Gap of scores across which tokens changed places, of each step and answer whose kept sets differ."""
    prompt: list[float] = field(default_factory=list)
    pictures: list[float] = field(default_factory=list)
    table: list[float] = field(default_factory=list)
    positions: int = 0
    """Masked positions, over the steps."""
    same_tokens: int = 0

    @property
    def other_tokens(self) -> float:
        """Share of the masked positions at which the likeliest token is another."""
        return 1.0 - self.same_tokens / self.positions if self.positions else 0.0


@dataclass
class Measured:
    """What prompts of one kind showed, those that were asked or random ones.

    Each kind is judged by its own: what a merge's closest call does to noise, of which a model makes nothing, is many
    times what it does to a picture, and would excuse any error there.
    """

    found: Distances = field(default_factory=Distances)
    """The backend's."""
    resolved: Distances = field(default_factory=Distances)
    """The witness's."""
    flips: list[tuple[str, float]] = field(default_factory=list)
    """Steps whose kept sets differ, and the relative gap of scores across which tokens changed places."""

    def both(self, backend: _T, witness: _T) -> tuple[tuple[Distances, _T], tuple[Distances, _T]]:
        """Either side's distances with what belongs to that side."""
        return (self.found, backend), (self.resolved, witness)


def _worst(values: Iterable[float]) -> float:
    """The largest; NaN if any is."""
    array = np.array([0.0, *values])
    return float(array.max())


def _capped(allowed: float) -> float:
    """``allowed``, at most :data:`HIGHEST`; a NaN, of a witness or an oracle that overflows, stays one."""
    return float(np.minimum(HIGHEST, allowed))


def kept_bound(precision: str, witness: Distances) -> float:
    """The largest relative gap of scores across which tokens may have changed places."""
    return _capped(FACTOR * _worst(witness.scores) + 2 * UNIT[precision])


def bounds(precision: str, where: str, backend: Distances, witness: Distances) -> list[Bound]:
    """Every figure of ``backend`` with the largest that passes.

    * logits, typically: the median over the steps of the root mean square error, 3 times the witness's + 1 unit.
    * logits, where nothing merges: the largest root mean square error of such a step: a median sees no fault of a batch
      or of a prompt without a picture. 3 times the witness's + 1 unit.
    * logits, at worst: the largest error of any logit at any step, 3 times the witness's + 2 units + what two tokens
      of a merge do by going elsewhere.
    * margins: a token may differ only where the logits' worst error may turn it, which is what two logits, each off
      by that much, lie apart; confidences likewise, by their log-odds.
    * other tokens: their share, whatever their margins, three times the witness's + one in a hundred.
    * kept sets: tokens may change places where their scores differ by no more than 3 times the error of scores.
    * embeddings: 3 times the witness's + 2 units; where they are computed in float32, float32's tolerance.
    """
    unit = UNIT[precision]
    flips = FLIP_FACTOR * _worst(witness.flips)

    def of(name: str, found: float, resolved: float, extra: float, factor: float = FACTOR) -> Bound:
        return Bound(name, where, found, _capped(factor * resolved + extra), resolved)

    if not backend.logits:
        return [Bound("logits", where, float("inf"), 0.0)]
    typical = of("logits, typical", float(np.median(backend.logits_rms)), float(np.median(witness.logits_rms)), unit)
    worst = of("logits, worst", _worst(backend.logits), _worst(witness.logits), 2 * unit + flips)
    unmerged = _worst(backend.unmerged_rms), _worst(witness.unmerged_rms)
    found = [
        typical,
        of("logits, where nothing merges", *unmerged, unit),
        worst,
        Bound("margin of other tokens", where, _worst(backend.margins), worst.allowed),
        Bound("confidence", where, _worst(backend.confidence), worst.allowed),
    ]
    if precision == "int8":
        share = Bound("share of other tokens", where, backend.other_tokens, 1 - INT8_AGREEMENT)
    else:
        share = of("share of other tokens", backend.other_tokens, witness.other_tokens, 0.01)
    if backend.positions:
        found.append(share)
    found.append(
        Bound("kept sets", where, _worst(backend.kept), kept_bound(precision, witness), _worst(witness.scores))
    )
    for name in ("prompt", "pictures", "table"):
        here, there = getattr(backend, name), getattr(witness, name)
        if not here:
            continue
        if precision in _EXACT_EMBEDDINGS:
            found.append(Bound(f"{name} embeddings", where, _worst(here), EMBEDDING_TOLERANCE))
        else:
            found.append(of(f"{name} embeddings", _worst(here), _worst(there), 2 * unit))
    return found
