"""Codes of few bits are ONNX's: held against its own reference types in ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from d3tom_export.quantize.grids import E2M1, E4M3, INT4, INT4_WHOLE, INT8, Grid, pack, unpack

GRIDS = {"int4": INT4, "whole int4": INT4_WHOLE, "int8": INT8, "e4m3": E4M3, "e2m1": E2M1}
REFERENCE = {
    "int4": ml_dtypes.int4,
    "whole int4": ml_dtypes.int4,
    "int8": np.int8,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


def values_of(grid: Grid) -> torch.Tensor:
    values = grid.decode(torch.arange(2**grid.bits, dtype=torch.uint8))
    lowest = -grid.largest if grid.lowest is None else grid.lowest
    return values[values.isfinite() & (values <= grid.largest) & (values >= lowest)]


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_those_of_onnx(name: str) -> None:
    grid = GRIDS[name]
    values = values_of(grid)
    expected = values.numpy().astype(REFERENCE[name])
    assert np.array_equal(expected.astype(np.float32), values.numpy())
    mask = 2**grid.bits - 1
    assert np.array_equal(expected.view(np.uint8) & mask, grid.encode(values).numpy())
    assert values.max() == grid.largest
    assert values.min() == (-8 if name == "whole int4" else -grid.largest)


@pytest.mark.parametrize("name", GRIDS)
@given(numbers=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30))
def test_nearest_is_nearest(name: str, numbers: list[float]) -> None:
    grid = GRIDS[name]
    given_ = torch.tensor(numbers)
    found = grid.nearest(given_)
    distances = (given_[:, None] - values_of(grid)).abs()
    assert torch.equal((given_ - found).abs(), distances.amin(-1))
    assert torch.equal(grid.decode(grid.encode(found)), found)


@pytest.mark.parametrize("name", ["e4m3", "e2m1"])
def test_ties_go_to_even(name: str) -> None:
    grid = GRIDS[name]
    values = values_of(grid).unique()
    between = (values[:-1] + values[1:]) / 2
    expected = between.numpy().astype(REFERENCE[name]).astype(np.float32)
    assert np.array_equal(grid.nearest(between).numpy(), expected)


@given(st.integers(1, 6), st.integers(1, 6))
def test_two_codes_lie_in_a_byte_as_onnx_packs_them(rows: int, pairs: int) -> None:
    codes = torch.arange(2 * rows * pairs, dtype=torch.uint8).view(2 * pairs, rows) % 16
    stored = pack(codes, 4)
    assert stored.shape == (rows * pairs,)
    assert torch.equal(unpack(stored, 4), codes.flatten())
    tensor = helper.make_tensor("codes", TensorProto.INT4, codes.shape, stored.numpy().tobytes(), raw=True)
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8) & 15, codes.numpy())
    assert torch.equal(pack(codes, 8), codes)


def searched(numbers: torch.Tensor) -> torch.Tensor:
    """What is nearest among e2m1's values by search: how it was found first."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    ends = (values[:-1] + values[1:]) / 2
    down = torch.bucketize(numbers.abs(), ends)
    at_end = numbers.abs() == ends[down.clamp(max=6)]
    return torch.copysign(values[torch.where(at_end & (down % 2 == 1) & (down < 7), down + 1, down)], numbers)


def test_floats_of_few_bits_are_those_of_a_search_and_of_a_conversion() -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    few = few[few.isfinite()]  # all signs and exponents, and every tie of either format
    numbers = torch.cat([few, few.nextafter(few * 2), few.nextafter(few / 2), torch.randn(10_000, generator=generator)])
    converted = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    for grid, expected in ((E2M1, searched(numbers)), (E4M3, converted)):
        found = grid.nearest(numbers)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))  # zeros keep their sign too
        assert torch.equal(grid.decode(grid.encode(found)), found)
