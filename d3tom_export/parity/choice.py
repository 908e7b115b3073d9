"""A backend's tokens and confidences against its own logits: no rounding before those excuses them.

Answers show only the tokens that they commit, and of confidences only the order. Imports no framework.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import Choices
from d3tom_export.loop.denoise import StepResult
from d3tom_export.loop.sampling import softmax64, without_banned
from d3tom_export.parity.bounds import UNIT, log_odds

_FLOAT32_UNIT = 2.0**-23
_FLOAT32_SUREST = 1e-9
"""Beyond 1 minus this a confidence in float64 still differs from 1; half precisions say less (:func:`log_odds`)."""
_SUMMING = 1e-3
"""By how much a sum of exponentials in float32 may move log-odds: a hundred thousand of them err by 1e-5."""


def check_choice(
    result: StepResult, rows: NDArray[np.bool_], scale: float, choices: Choices, precision: str
) -> str | None:
    """What is wrong with the tokens and confidences of ``result`` at the positions ``rows`` (B, G), or None.

    The one rounding that is left is that of the logits themselves, whose largest is ``scale`` in the reference: to the
    precision's unit, and of int8, whose graphs give out their last product in float32, to float32's. The logits must be
    there, and finite. Tokens are among the ``choices`` everywhere, not only at ``rows``.
    """
    assert result.logits is not None
    half = precision in ("fp16", "bf16")
    rounding = (UNIT[precision] if half else _FLOAT32_UNIT) * scale
    logits, token, confidence = result.logits[rows], result.token[rows][:, None], result.confidence[rows]
    logits = without_banned(logits, choices)
    tokens = logits[:, : choices.rows]
    inside = (result.token >= 0) & (result.token < tokens.shape[-1])
    if not inside.all() or np.isin(result.token, choices.banned).any():
        return "tokens that the model does not have"
    with np.errstate(invalid="ignore"):  # infinity less itself is no number, and fails below
        behind = tokens.max(axis=-1, initial=-np.inf) - np.take_along_axis(tokens, token, axis=-1)[:, 0]
    if not (behind <= rounding).all():
        return "tokens that are not the likeliest by the logits beside them"
    own, surest = np.take_along_axis(softmax64(logits), token, axis=-1)[:, 0], 1e-4 if half else _FLOAT32_SUREST
    odds, allowed = np.abs(log_odds(confidence, surest) - log_odds(own, surest)), 2 * rounding + _SUMMING
    if not (odds <= allowed).all():
        return (
            f"confidences that do not follow from the logits beside them (log-odds {odds.max():.2g} off, allowed "
            f"{allowed:.2g})"
        )
    return None
