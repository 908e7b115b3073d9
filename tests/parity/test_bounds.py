"""Bounds follow from the witness, are never above a half, and nothing that does not compare holds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from d3tom_export.parity.bounds import (
    FACTOR,
    HIGHEST,
    INT8_AGREEMENT,
    UNIT,
    Bound,
    Distances,
    bounds,
    kept_bound,
    log_odds,
    relative_difference,
    rms_difference,
)


def _distances(error: float) -> Distances:
    return Distances(
        logits=[error, 2 * error],
        logits_rms=[error, error, 9.0],
        scores=[error],
        prompt=[error],
        pictures=[error],
        table=[error],
        positions=100,
        same_tokens=99,
    )


@pytest.mark.parametrize("precision", list(UNIT))
def test_every_figure_is_bounded(precision: str) -> None:
    found = {bound.name: bound for bound in bounds(precision, "", _distances(0.002), _distances(0.001))}
    assert found["logits, typical"].allowed == pytest.approx(FACTOR * 0.001 + UNIT[precision])
    assert found["logits, typical"].found == 0.002
    assert found["logits, worst"].allowed == pytest.approx(FACTOR * 0.002 + 2 * UNIT[precision])
    assert found["margin of other tokens"].allowed == found["confidence"].allowed == found["logits, worst"].allowed
    share = 1 - INT8_AGREEMENT if precision == "int8" else FACTOR * 0.01 + 0.01
    assert found["share of other tokens"].allowed == pytest.approx(share)
    assert found["kept sets"].allowed == kept_bound(precision, _distances(0.001))
    embeddings = 1e-4 if precision in ("int8", "fp32") else FACTOR * 0.001 + 2 * UNIT[precision]
    for name in ("prompt", "pictures", "table"):
        assert found[f"{name} embeddings"].allowed == pytest.approx(embeddings)


def test_a_precision_that_resolves_nothing_bounds_all_the_same() -> None:
    for bound in bounds("bf16", "", _distances(0.1), _distances(3.0)):
        assert bound.allowed <= HIGHEST


def test_what_does_not_compare_does_not_hold() -> None:
    (bound,) = bounds("fp16", "", Distances(), Distances())
    assert not bound.holds
    assert not Bound("x", "", float("nan"), 1.0).holds
    assert not Bound("x", "", 0.0, float("nan")).holds
    assert not Bound("x", "", float("inf"), float("inf")).holds
    assert json.dumps(Bound("x", "", float("nan"), 1.0).to_json(), allow_nan=False)
    broken = _distances(0.001)
    broken.logits.append(float("nan"))
    assert not all(bound.holds for bound in bounds("fp16", "", broken, _distances(0.001)))
    assert not all(bound.holds for bound in bounds("fp16", "", _distances(0.001), broken))


def test_differences_fail_closed() -> None:
    ones = np.ones((2, 3), dtype=np.float32)
    for difference in (relative_difference, rms_difference):
        assert difference(ones, ones) == 0.0
        assert difference(ones[:1], ones) == np.inf
        assert difference(ones * np.nan, ones) == np.inf
        assert difference(-ones, ones) == pytest.approx(2.0)
    assert np.isfinite(log_odds(np.array([0.0, 1.0]))).all()
