"""A value against its reference: fails closed, and judges every element by a scale of its own."""

from __future__ import annotations

import numpy as np
import pytest

from d3tom_export.diagnosis.compare import LAYER_TOLERANCE, STAGE_TOLERANCE, TIED_SIMILARITY, Difference, compare


def _reference() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)


def test_a_value_equals_itself() -> None:
    assert compare(_reference(), _reference(), 1e-6) == Difference(0.0, 0.0, 1e-6)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "missing"),
        (np.zeros((2, 5, 7), dtype=np.float32), "shape is (2, 5, 7), expected (2, 5, 8)"),
        (np.zeros((2, 5, 8), dtype=np.int64), "dtype is int64, expected float32"),
    ],
)
def test_what_does_not_compare_departs(found: np.ndarray | None, says: str) -> None:
    difference = compare(found, _reference(), 1e9)
    assert difference.departs
    assert np.isinf(difference.error)
    assert says in str(difference.problem)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nothing_that_is_not_finite_passes(value: float) -> None:
    found = _reference()
    found[1, 2, 3] = value
    assert compare(found, _reference(), 1e9).problem == "1 of 80 elements are NaN or infinite"
    assert compare(_reference(), found, 1e9).departs  # nor does a reference that is not
    assert compare(found, _reference(), 1e9, exempt=np.ones((2, 5), dtype=np.bool_)).departs


def test_integers_and_booleans_are_equal_or_not() -> None:
    kept = np.arange(6).reshape(2, 3)
    other = kept.copy()
    other[1, 1] = 9
    assert not compare(kept, kept, 0.0).departs
    assert compare(other, kept, 1e9).problem == "1 of 6 elements differ"


def test_errors_are_relative_to_the_element_and_to_the_tensor() -> None:
    reference = np.ones((1, 100), dtype=np.float32)
    reference[0, 0] = 0.0  # near nothing, beside ones
    found = reference.copy()
    found[0, 0] = 1e-3
    assert compare(found, reference, 1.0).error == pytest.approx(1e-3, rel=0.02)
    reference[0, 1] = 1000.0  # an outlier channel, off by a thousandth of itself
    found = reference.copy()
    found[0, 1] = 1001.0
    assert compare(found, reference, 1.0).error == pytest.approx(1e-3, rel=0.15)
    assert compare(found, reference, 1.0).largest == pytest.approx(1.0)


def test_a_row_may_be_any_of_its_alternatives_but_no_mixture_of_them() -> None:
    reference = _reference()
    first, second = reference.copy(), reference.copy()
    first[0, 1] += 1.0
    second[1, 4] -= 2.0
    found = reference.copy()
    found[0, 1], found[1, 4] = first[0, 1], second[1, 4]
    assert compare(found, reference, 1e-6).departs
    assert not compare(found, reference, 1e-6, [first, second]).departs
    found[0, 1, :4] = reference[0, 1, :4]
    assert compare(found, reference, 1e-6, [first, second]).departs
    found[0, 1] = first[0, 1] + np.float32(0.01)
    assert compare(found, reference, 1e-6, [first, second]).largest == pytest.approx(0.01, rel=1e-3)


def test_exempt_rows_excuse_no_other() -> None:
    found, exempt = _reference(), np.zeros((2, 5), dtype=np.bool_)
    found[1, 3] += 1.0
    exempt[1, 3] = True
    assert not compare(found, _reference(), 1e-6, exempt=exempt).departs
    found[1, 2] += 1.0
    assert compare(found, _reference(), 1e-6, exempt=exempt).departs


def test_tolerances_leave_room_above_rounding() -> None:
    """The unit roundoff of each precision; a layer may add up a few, a stage more."""
    for precision, roundoff in (("fp32", 2.0**-24), ("fp16", 2.0**-11), ("bf16", 2.0**-8)):
        assert 8 * roundoff < LAYER_TOLERANCE[precision] < STAGE_TOLERANCE[precision]
        assert TIED_SIMILARITY[precision] == pytest.approx(8 * roundoff, rel=0.1)
