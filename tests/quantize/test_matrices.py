"""Scales and roundings: what they lose, by the format, and what GPTQ gains on products like those it saw."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d3tom_export.quantize import matrices
from d3tom_export.quantize.matrices import FORMATS, Format, format_for, gptq, round_to_nearest
from d3tom_export.quantize.plan import block_for

NAMES = tuple(FORMATS)


def weight_of(outputs: int = 96, inputs: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight[:, 7] *= 6  # an outlier, as trained models have them
    return weight


def rows_of(inputs: int = 256, seed: int = 1) -> Tensor:
    """Rows that use few directions, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4000, 32, generator=generator) @ torch.randn(
        32, inputs, generator=torch.Generator().manual_seed(9)
    )


def block_of(form: Format, inputs: int) -> int:
    block = block_for(form.block, inputs)
    assert block is not None
    return block


@pytest.mark.parametrize(
    ("wanted", "inputs", "block"),
    [(128, 256, 128), (128, 352, 32), (64, 4096, 64), (None, 352, 352), (16, 40, None), (128, 24, None)],
)
def test_a_block_divides_the_inputs(wanted: int | None, inputs: int, block: int | None) -> None:
    assert block_for(wanted, inputs) == block


# Relative to the weight's norm. The outlier takes some of int4's and int8's steps; fp8 has its three digits anywhere.
@pytest.mark.parametrize(("name", "lost"), [("int4", 0.2), ("int8", 0.018), ("fp8", 0.027), ("nvfp4", 0.1)])
def test_what_rounding_loses(name: str, lost: float) -> None:
    form, weight = FORMATS[name], weight_of()  # type: ignore[index]
    quantized = round_to_nearest(weight, form, block_of(form, 256))
    assert torch.equal(form.grid.nearest(quantized.values), quantized.values)
    if form.scale_grid is not None:
        assert torch.equal(form.scale_grid.nearest(quantized.scales), quantized.scales)
    error = ((quantized.numbers - weight).norm() / weight.norm()).item()
    assert lost / 2 < error < lost


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    form = FORMATS[name]
    weight = torch.zeros(4, 128)
    assert torch.equal(round_to_nearest(weight, form, block_of(form, 128)).numbers, weight)
    weight[0, 3] = 1.0
    assert round_to_nearest(weight, form, block_of(form, 128)).numbers.isfinite().all()


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_gptq_loses_less_of_the_products(name: str) -> None:
    form, weight, rows = FORMATS[name], weight_of(), rows_of()  # type: ignore[index]
    block = block_of(form, 256)
    products = rows.T @ rows
    unseen = rows_of(seed=2)
    plain, better = (
        ((unseen @ (quantized.numbers - weight).T).norm() / (unseen @ weight.T).norm()).item()
        for quantized in (round_to_nearest(weight, form, block), gptq(weight, products, form, block))
    )
    assert better < 0.5 * plain


def test_a_large_weight_is_rounded_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for form in FORMATS.values():
        whole = round_to_nearest(weight_of(), form, block_of(form, 256))
        with monkeypatch.context() as patch:
            patch.setattr(matrices, "_AT_ONCE", 7 * 256)
            parts = round_to_nearest(weight_of(), form, block_of(form, 256))
        assert all(torch.equal(mine, other) for mine, other in zip(whole[:3], parts[:3], strict=True))


def test_zero_points_lose_less_where_numbers_lie_to_one_side() -> None:
    form, symmetric = format_for("int4", asymmetric=True), FORMATS["int4"]
    weight = weight_of()
    shifted = weight.abs()
    for each, better in ((shifted, 0.65), (weight, 1.0)):
        matrix, plain = (round_to_nearest(each, kind, 64) for kind in (form, symmetric))
        assert matrix.zeros is not None
        assert matrix.zeros.shape == matrix.scales.shape
        assert matrix.values.min() >= -8
        assert torch.equal(matrix.zeros, matrix.zeros.round().clamp(-8, 7))
        assert (matrix.numbers - each).norm() < better * (plain.numbers - each).norm()
    # 0 is a value of every block: a weight that was pruned stays so.
    pruned = weight * (weight > 0.5)
    assert not round_to_nearest(pruned, form, 64).numbers[pruned == 0].any()


def test_gptq_gains_with_zero_points_too() -> None:
    form, weight, rows = format_for("int4", asymmetric=True), weight_of(), rows_of()
    plain, better = (
        ((rows @ (matrix.numbers - weight).T).norm() / (rows @ weight.T).norm()).item()
        for matrix in (round_to_nearest(weight, form, 64), gptq(weight, rows.T @ rows, form, 64))
    )
    assert better < 0.5 * plain


def test_gptq_without_correlation_is_rounding() -> None:
    form, weight = FORMATS["int8"], weight_of(16, 128)
    by_itself = gptq(weight, torch.eye(128) * 3, form, 128)
    torch.testing.assert_close(by_itself.numbers, round_to_nearest(weight, form, 128).numbers)


def test_gptq_takes_inputs_that_were_never_seen() -> None:
    form, weight, rows = FORMATS["int4"], weight_of(16, 128), rows_of(128)
    rows[:, :64] = 0
    quantized = gptq(weight, rows.T @ rows, form, 64)
    plain = round_to_nearest(weight, form, 64)
    torch.testing.assert_close(quantized.numbers[:, :64], plain.numbers[:, :64])
    assert not torch.equal(quantized.numbers[:, 64:], plain.numbers[:, 64:])


def test_a_block_may_be_larger_than_what_is_corrected_at_once() -> None:
    form, weight, rows = FORMATS["int8"], weight_of(), rows_of()
    quantized = gptq(weight, rows.T @ rows, form, 256)
    plain = round_to_nearest(weight, form, 256)
    lost = [(rows @ (each.numbers - weight).T).norm() for each in (quantized, plain)]
    assert lost[0] < lost[1]
