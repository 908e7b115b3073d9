"""Tokens and confidences that do not follow from the logits beside them are found, whatever the precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from d3tom_export.config import Choices
from d3tom_export.loop.denoise import StepResult
from d3tom_export.loop.sampling import softmax64
from d3tom_export.parity.choice import check_choice
from d3tom_export.parity.ties import kept_gap

VOCAB, ROWS = 9, 11
CHOICES = Choices(VOCAB)
"""The head has two rows of padding."""
LOGITS = np.random.default_rng(0).normal(scale=3.0, size=(2, 5, ROWS)).astype(np.float32)
TOKEN = LOGITS[..., :VOCAB].argmax(axis=-1)
RIGHT = StepResult(
    token=TOKEN,
    confidence=np.take_along_axis(softmax64(LOGITS), TOKEN[..., None], axis=-1)[..., 0],
    logits=LOGITS,
    kept=None,
)
MASKED = np.array([[True, True, True, False, False]] * 2)


def _wrong(result: StepResult, precision: str = "fp32") -> str | None:
    return check_choice(result, MASKED, float(np.abs(LOGITS).max()), CHOICES, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_what_follows_from_the_logits_passes(precision: str) -> None:
    assert _wrong(RIGHT, precision) is None
    assert check_choice(RIGHT, np.zeros_like(MASKED), 1.0, CHOICES, precision) is None  # nothing is masked any more


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("number", [-1, VOCAB, ROWS])
@pytest.mark.parametrize("place", [0, 4], ids=["masked", "committed"])
def test_tokens_that_are_not_there(precision: str, number: int, place: int) -> None:
    token = TOKEN.copy()
    token[1, place] = number
    assert _wrong(replace(RIGHT, token=token), precision) == "tokens that the model does not have"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_tokens_that_are_not_the_likeliest(precision: str) -> None:
    token = TOKEN.copy()
    token[0, 2] = LOGITS[0, 2, :VOCAB].argmin()
    assert "not the likeliest" in str(_wrong(replace(RIGHT, token=token), precision))


@pytest.mark.parametrize(
    "change",
    [lambda c: c / 2, lambda c: c**2, lambda c: c * np.nan, lambda c: c * 0],
    ids=["half", "square", "NaN", "0"],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_confidences_of_another_softmax(precision: str, change: object) -> None:
    assert callable(change)
    assert "confidences" in str(_wrong(replace(RIGHT, confidence=change(RIGHT.confidence)), precision))


@pytest.mark.parametrize("found", [[0, -1], [0, 4], [0]])
def test_kept_tokens_that_are_not_there_are_no_near_tie(found: list[int]) -> None:
    scores = np.ones(4, dtype=np.float32)
    assert kept_gap(np.array(found), np.array([0, 3]), scores) == np.inf
    assert kept_gap(np.array([0, 2]), np.array([0, 3]), scores) == 0.0
