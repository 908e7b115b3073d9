"""A product's weight in fewer bits: scales, and rounding to nearest or, where samples are at hand, by GPTQ.

GPTQ (arXiv 2210.17323) rounds a weight column by column and lets the columns that are still to come make up for what
was lost, as the products that the weight was seen in weigh it. N outputs, K inputs of a product, b inputs a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from d3tom_export.config import QuantFormat
from d3tom_export.quantize.grids import E2M1, E4M3, INT4, INT4_WHOLE, INT8, Grid


@dataclass(frozen=True)
class Format:
    """How the weights of a product are stored."""

    name: QuantFormat
    grid: Grid
    block: int | None = None
    """Inputs that share a scale; None: all of an output's."""
    scale_grid: Grid | None = None
    """Of scales that are codes themselves, with one float32 scale for all of them; None: scales are float32."""

    @property
    def has_zeros(self) -> bool:
        """Whether a zero point stands beside each scale: a value of the grid, which stands for 0."""
        return self.grid.lowest is not None


FORMATS: dict[QuantFormat, Format] = {
    "int4": Format("int4", INT4, block=128),
    "int8": Format("int8", INT8),
    "fp8": Format("fp8", E4M3),
    "nvfp4": Format("nvfp4", E2M1, block=16, scale_grid=E4M3),
}

_ASYMMETRIC = replace(FORMATS["int4"], grid=INT4_WHOLE)


def format_for(name: QuantFormat, *, asymmetric: bool = False) -> Format:
    """The format called ``name``, of int4 with zero points where ``asymmetric``."""
    assert not asymmetric or name == "int4"
    return _ASYMMETRIC if asymmetric else FORMATS[name]


_SMALLEST = 1e-30
"""Of a scale: a block of zeros has one too."""
_CLIPS = torch.linspace(1.0, 0.6, 9)
"""Shares of a block's largest number that its scale may be made for: the larger ones are cut off where the others gain
more than they lose."""
_DAMPING = 0.01
_AT_ONCE = 1 << 18
"""Numbers that are rounded at a time: nine scales are tried on each, which a core's own cache holds meanwhile."""
_LAZY = 128
"""Columns after which GPTQ's corrections are brought to the rest of the weight."""


class QuantizedMatrix(NamedTuple):
    """A weight (N, K) as values of a format's grid times scales."""

    values: Tensor
    """(N, K) float32, each a value of the grid"""
    scales: Tensor
    """(N, K / b) float32, or values of the scales' grid"""
    whole: Tensor
    """() float32, by which all scales are multiplied; 1 where they are no codes"""
    input_scale: Tensor | None = None
    """() float32, of what is multiplied with it, where that is rounded to float8"""
    zeros: Tensor | None = None
    """(N, K / b) float32, values of the grid that stand for 0; None: 0 does"""

    @property
    def numbers(self) -> Tensor:
        """The weight that it stands for: (N, K) float32, in the order of products in which runtimes compute it."""
        scales = self.scales * self.whole
        block = self.values.shape[1] // scales.shape[1]
        values = self.values
        if self.zeros is not None:
            values = values - self.zeros.repeat_interleave(block, dim=1)
        return values * scales.repeat_interleave(block, dim=1)


def largest_of(weight: Tensor) -> Tensor:
    """() float32, the largest number's size in ``weight`` of any float dtype. Raises ``ValueError`` unless finite."""
    low, high = weight.aminmax()
    largest = torch.maximum(-low, high).float()
    if not largest.isfinite():
        raise ValueError("it holds numbers that are not finite")
    return largest


def _whole_scale(largest: Tensor, form: Format) -> Tensor:
    """By which the scales of a weight whose ``largest`` number is given are multiplied."""
    if form.scale_grid is None:
        return torch.ones(())
    return (largest / (form.grid.largest * form.scale_grid.largest)).clamp_min(_SMALLEST)


class _Steps(NamedTuple):
    """Of blocks (N, n): scales, which are values of the scales' grid where there is one, and zero points, or zeros."""

    scales: Tensor
    zeros: Tensor

    @property
    def of_numbers(self) -> _Steps:
        """As they broadcast to the blocks' numbers (N, n, b)."""
        return _Steps(self.scales.unsqueeze(-1), self.zeros.unsqueeze(-1))

    def round(self, numbers: Tensor, form: Format, whole: Tensor) -> tuple[Tensor, Tensor]:
        """The values of ``numbers``, and what those stand for; ``self`` broadcasts to them."""
        effective = (self.scales * whole).clamp_min(_SMALLEST)
        if not form.has_zeros:
            values = form.grid.nearest(numbers / effective)
            return values, values * effective
        values = form.grid.nearest(numbers / effective + self.zeros)
        return values, (values - self.zeros) * effective


def _candidate(low: Tensor, high: Tensor, clip: Tensor, form: Format, whole: Tensor) -> _Steps:
    """Steps (N, n) of blocks whose numbers go from ``low`` to ``high``, 0 among them, the ends cut to ``clip``."""
    if form.grid.lowest is None:
        scales = (torch.maximum(-low, high) * clip / form.grid.largest / whole).clamp_min(_SMALLEST)
        scales = scales if form.scale_grid is None else form.scale_grid.nearest(scales)
        return _Steps(scales, torch.zeros_like(scales))
    scales = ((high - low) * clip / (form.grid.largest - form.grid.lowest)).clamp_min(_SMALLEST)
    return _Steps(scales, form.grid.nearest(form.grid.lowest - low * clip / scales))


def _steps(blocks: Tensor, form: Format, whole: Tensor, importance: Tensor | None) -> _Steps:
    """Steps (N, n) of ``blocks`` (N, n, b): of several, those that lose least, by ``importance`` (n, b) or squares."""
    low, high = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
    found, least = None, None
    for clip in _CLIPS:
        steps = _candidate(low, high, clip, form, whole)
        lost = (steps.of_numbers.round(blocks, form, whole)[1] - blocks).square()
        error = (lost if importance is None else lost * importance).sum(-1)
        if found is None or least is None:
            found, least = steps, error
        else:
            better = error < least
            chosen = (torch.where(better, mine, other) for mine, other in zip(steps, found, strict=True))
            found, least = _Steps(*chosen), torch.where(better, error, least)
    assert found is not None
    return found


def _empty(weight: Tensor, form: Format, block: int, largest: Tensor | None = None) -> QuantizedMatrix:
    """Room for ``weight`` (N, K) quantized."""
    scales = weight.new_empty(weight.shape[0], weight.shape[1] // block)
    zeros = torch.empty_like(scales) if form.has_zeros else None
    whole = _whole_scale(largest_of(weight) if largest is None else largest, form)
    return QuantizedMatrix(torch.empty_like(weight), scales, whole, zeros=zeros)


def round_to_nearest(weight: Tensor, form: Format, block: int, largest: Tensor | None = None) -> QuantizedMatrix:
    """``weight`` (N, K) float32 rounded number by number.

    ``largest`` is that of the weight that these are rows of; None: its own (:func:`largest_of`, which may raise).
    """
    matrix = _empty(weight, form, block, largest)
    # By rows, so that what is needed beside the weight does not grow with it.
    rows = max(1, _AT_ONCE // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        here = slice(start, start + rows)
        blocks = weight[here].unflatten(1, (-1, block))
        steps = _steps(blocks, form, matrix.whole, None)
        matrix.scales[here] = steps.scales
        if matrix.zeros is not None:
            matrix.zeros[here] = steps.zeros
        matrix.values[here] = steps.of_numbers.round(blocks, form, matrix.whole)[0].flatten(1)
    return matrix


def _factor(products: Tensor) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse of ``products`` (K, K) once they are damped, and their diagonal (K,).

    Inputs that were never seen count as seen once. Of such matrices, the largest that there are, two are held at a time
    beside ``products``.
    """
    products = products.clone()
    diagonal = products.diagonal()
    diagonal[diagonal == 0] = 1.0
    importance = diagonal.clone()
    diagonal += _DAMPING * diagonal.mean().item()
    lower = torch.linalg.cholesky(products)
    del products, diagonal
    inverse = torch.cholesky_inverse(lower)
    del lower
    return torch.linalg.cholesky(inverse, upper=True), importance


def gptq(weight: Tensor, products: Tensor, form: Format, block: int) -> QuantizedMatrix:
    """``weight`` (N, K) float32 rounded so that its products with what was seen lose little.

    ``products`` (K, K) float32 is the sum of x x^T over the rows x that the weight was multiplied with. Inputs that
    were always zero are rounded to nearest. Raises :class:`torch.linalg.LinAlgError` where ``products`` is not finite.
    """
    factor, importance = _factor(products)
    weight, inputs = weight.clone(), weight.shape[1]
    matrix = _empty(weight, form, block)
    steps = _Steps(weight.new_empty(()), weight.new_empty(()))
    for start in range(0, inputs, _LAZY):
        end = min(start + _LAZY, inputs)
        part, triangle = weight[:, start:end].clone(), factor[start:end, start:end]
        errors = torch.empty_like(part)
        for column in range(end - start):
            place = start + column
            if place % block == 0:
                # What of the block lies beyond this part has had no correction of this part's yet: near enough.
                numbers = torch.cat([part[:, column : column + block], weight[:, end : place + block]], dim=1)
                weights = importance[place : place + block]
                found = _steps(numbers.unsqueeze(1), form, matrix.whole, weights[None])
                matrix.scales[:, place // block] = found.scales[:, 0]
                if matrix.zeros is not None:
                    matrix.zeros[:, place // block] = found.zeros[:, 0]
                steps = _Steps(found.scales[:, 0], found.zeros[:, 0])
            matrix.values[:, place], rounded = steps.round(part[:, column], form, matrix.whole)
            error = (part[:, column] - rounded) / triangle[column, column]
            errors[:, column] = error
            part[:, column + 1 :] -= error.unsqueeze(1) * triangle[column, column + 1 :]
        weight[:, end:] -= errors @ factor[start:end, end:]
    return matrix
