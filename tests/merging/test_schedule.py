"""Merge ratio and kept count over the steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.config import MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.merging.schedule import kept_at_prefill, kept_tokens, merge_ratio


def test_keeps_what_the_original_keeps_at_the_paper_geometry() -> None:
    # lavida.md E1: N_vis 1008, ratio 0.8 adaptive, 64 steps.
    config = MergeConfig(layer=3, ratio=0.8)
    kept = [kept_tokens(1008, merge_ratio(config, step, 64)) for step in (1, 2, 8, 32, 63)]
    assert kept == [6, 12, 50, 201, 396]


def test_truncates_in_double_precision_and_keeps_at_least_one() -> None:
    assert kept_tokens(1008, 0.8) == 201
    assert kept_tokens(10, 0.9) == 1  # 10 * (1 - 0.9) is just below 1: the release raises an error here
    assert kept_tokens(100, 0.9) == 9
    assert kept_tokens(5, 1.0) == 1
    assert kept_tokens(0, 0.5) == 0


ratios = st.floats(0, 1, exclude_max=True)


@given(ratio=ratios, steps=st.integers(1, 200), visual=st.integers(1, 5000))
def test_adaptive_falls_from_one_and_stays_in_range(ratio: float, steps: int, visual: int) -> None:
    config = MergeConfig(layer=0, ratio=ratio)
    values = [merge_ratio(config, step, steps) for step in range(steps)]
    assert values[0] == 1.0
    assert all(0.0 <= b <= a <= 1.0 for a, b in pairwise(values))
    assert all(1 <= kept_tokens(visual, value) <= visual for value in values)


@given(ratio=st.floats(0.5, 1, exclude_max=True), steps=st.integers(2, 200))
def test_adaptive_averages_the_ratio(ratio: float, steps: int) -> None:
    config = MergeConfig(layer=0, ratio=ratio)
    # The mean over t = 0..T (both ends) of a straight line is its middle.
    mean = sum(merge_ratio(config, step, steps) for step in range(steps + 1)) / (steps + 1)
    assert abs(mean - ratio) < 1e-9


@given(ratio=ratios, step=st.integers(0, 10))
def test_fixed_and_none(ratio: float, step: int) -> None:
    assert merge_ratio(MergeConfig(0, ratio, "fixed"), step, 11) == ratio
    assert merge_ratio(MergeConfig(0, ratio, "none"), step, 11) == 0.0


def test_keep_multiple_rounds_up_and_never_beyond_v() -> None:
    assert [kept_tokens(100, ratio, 16) for ratio in (0.99, 0.9, 0.84, 0.5, 0.02, 0.0)] == [16, 16, 16, 64, 100, 100]
    assert kept_tokens(5, 0.9, 16) == 5
    assert kept_tokens(0, 0.9, 16) == 0
    assert MergeConfig.from_json(MergeConfig(1, 0.7, keep_multiple=8).to_json()).keep_multiple == 8
    for wrong in (0, -1, 1.5):
        with pytest.raises(D3tomError, match=r"keep multiple .* not a whole number of at least 1"):
            MergeConfig(1, 0.7, keep_multiple=wrong)  # type: ignore[arg-type]


def test_a_prefill_keeps_by_the_fixed_ratio_where_it_merges_at_all() -> None:
    merge = MergeConfig(1, 0.8, merge_at="prefill").in_loop(True)
    assert merge.schedule == "fixed"
    assert kept_at_prefill(merge, 1008) == kept_tokens(1008, 0.8) == 201
    assert kept_at_prefill(replace(merge, keep_multiple=16), 1008) == 208
    assert kept_at_prefill(replace(merge, ratio=0.0), 1008) == 1008
    assert kept_at_prefill(merge, 0) is None
    assert kept_at_prefill(replace(merge, schedule="none"), 1008) is None
    assert kept_at_prefill(MergeConfig(1, 0.8), 1008) is None
    assert kept_at_prefill(merge.in_loop(False), 1008) is None
