"""The launch plan: every row and column is covered once, workspaces nest, and impossible sizes are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.errors import D3tomError
from d3tom_export.plugins.launch import (
    DTYPES,
    WIDE_PROGRAMS,
    MergeSizes,
    buffer_names,
    ceil_div,
    check_sizes,
    launches,
    spec,
    variants,
    workspace,
)


@st.composite
def sizes(draw: st.DrawFn) -> MergeSizes:
    """Sizes the kernels take, up to the largest promised."""
    visual = draw(st.integers(1, 8192))
    kept = draw(st.integers(1, visual))
    width = st.one_of(st.integers(1, 8192), st.sampled_from([64, 4096]))
    further = tuple(draw(st.lists(width, max_size=3)))
    return MergeSizes(draw(st.integers(1, 4)), visual, kept, draw(width), draw(width), further)


@given(sizes(), st.sampled_from(DTYPES))
def test_the_grid_covers_the_merge_and_no_block_is_empty(merge: MergeSizes, dtype: str) -> None:
    nearest, order, *totals = launches(merge, dtype)
    tiles = spec(nearest.variant).constants
    assert nearest.grid == (
        ceil_div(merge.visual, tiles["BLOCK_V"]),
        ceil_div(merge.kept, tiles["BLOCK_K"]),
        merge.batch,
    )
    assert order.grid == (ceil_div(merge.visual, spec(order.variant).constants["BLOCK_V"]), merge.batch, 1)
    assert order.sizes[2] == nearest.grid[1]
    held = set(variants(dtype, merge.depth, *merge.widths))
    for width, total in zip(merge.widths, totals, strict=True):
        assert total.grid == (ceil_div(width, spec(total.variant).constants["BLOCK_W"]), merge.kept, merge.batch)
        assert total.sizes[2] == width
        assert max(nearest.grid[1:] + total.grid[1:]) < 65536
        assert {nearest.variant, order.variant, total.variant} <= held
    assert held <= set(variants(dtype))


def test_every_row_input_is_summed_by_one_search() -> None:
    plan = launches(MergeSizes(2, 30, 4, 16, 64, (5, 0, 32)), "float16")
    assert [step.variant.name for step in plan] == ["nearest-narrow", "order", "sum", "sum-ragged", "sum"]
    assert [step.arguments for step in plan] == [
        ("normed", "kept", 30, 4, 16, "scores", "slots"),
        ("scores", "slots", "kept", 30, 4, 1, "order", "starts"),
        ("hidden", "order", "starts", 30, 4, 64, "merged"),
        ("hidden_2", "order", "starts", 30, 4, 5, "merged_2"),
        # hidden_3 is empty
        ("hidden_4", "order", "starts", 30, 4, 32, "merged_4"),
    ]
    assert buffer_names(2) == ("hidden", "normed", "kept", "hidden_2", "merged", "merged_2")
    with pytest.raises(D3tomError, match="1 to 8 row inputs by one search; found 9"):
        buffer_names(9)


@given(sizes(), sizes(), st.sampled_from(DTYPES))
def test_a_workspace_holds_every_smaller_merge(one: MergeSizes, two: MergeSizes, dtype: str) -> None:
    largest = MergeSizes(*map(max, one[:5], two[:5]))  # further row inputs share it
    assert workspace(one).size <= workspace(largest).size
    offsets, end = workspace(one)
    blocks = launches(one, dtype)[0].grid[1]
    used = {
        "scores": 4 * one.batch * blocks * one.visual,
        "slots": 4 * one.batch * blocks * one.visual,
        "order": 4 * one.batch * one.visual,
        "starts": 4 * one.batch * one.kept,
    }
    limits = [*sorted(offsets.values())[1:], end]
    for (name, start), limit in zip(sorted(offsets.items(), key=lambda item: item[1]), limits, strict=True):
        assert start % 256 == 0
        assert start + used[name] <= limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes_fill_a_gpu(dtype: str) -> None:
    for kept in (100, 400):
        nearest, _, total = launches(MergeSizes(1, 1008, kept, 4096, 4096), dtype)
        assert nearest.grid[0] * nearest.grid[1] >= WIDE_PROGRAMS
        assert total.grid[0] * total.grid[1] >= 8 * 132
    # Few programs take the small tiles, many the large.
    assert launches(MergeSizes(1, 1008, 100, 4096, 4096), dtype)[0].variant.name == "nearest-narrow"
    assert launches(MergeSizes(1, 1008, 400, 4096, 4096), dtype)[0].variant.name == "nearest-wide"
    ragged = launches(MergeSizes(1, 1008, 400, 4095, 33), dtype)
    assert [step.variant.name for step in ragged] == ["nearest-ragged", "order", "sum-ragged"]


def test_nothing_is_launched_where_nothing_is_written() -> None:
    assert launches(MergeSizes(0, 10, 5, 16, 16), "float32") == ()
    assert launches(MergeSizes(1, 0, 0, 16, 16), "float32") == ()


@pytest.mark.parametrize(
    ("merge", "word"),
    [
        (MergeSizes(1, 10, 11, 4, 4), "11 of 10"),
        (MergeSizes(1, 50_000, 50_000, 4, 4), "2\\^31"),
        (MergeSizes(1, 8192, 10, 2**18, 4), "width 262144"),
        (MergeSizes(70_000, 10, 5, 4, 4), "batch of 70000"),
        (MergeSizes(1, 8192, 10, 4, 4, (2**18,)), "width 262144"),
        (MergeSizes(1, 10, 5, 4, 4, (-1,)), "5 of 10"),
    ],
)
def test_impossible_sizes_are_refused(merge: MergeSizes, word: str) -> None:
    with pytest.raises(D3tomError, match=word):
        check_sizes(merge)
