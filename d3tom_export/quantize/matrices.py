"""A product's weight in fewer bits: scales, and rounding to nearest or, where samples are at hand, by GPTQ.

GPTQ (arXiv 2210.17323) rounds a weight column by column and lets the columns that are still to come make up for what
was lost, as the products that the weight was seen in weigh it. N outputs, K inputs of a product, b inputs a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from d3tom_export.config import QuantFormat
from d3tom_export.quantize.grids import E2M1, E4M3, INT4, INT8, Grid


@dataclass(frozen=True)
class Format:
    """How the weights of a product are stored."""

    name: QuantFormat
    grid: Grid
    block: int | None = None
    """Inputs that share a scale; None: all of an output's."""
    scale_grid: Grid | None = None
    """Of scales that are codes themselves, with one float32 scale for all of them; None: scales are float32."""


FORMATS: dict[QuantFormat, Format] = {
    "int4": Format("int4", INT4, block=128),
    "int8": Format("int8", INT8),
    "fp8": Format("fp8", E4M3),
    "nvfp4": Format("nvfp4", E2M1, block=16, scale_grid=E4M3),
}

_SMALLEST = 1e-30
"""Of a scale: a block of zeros has one too."""
_CLIPS = torch.linspace(1.0, 0.6, 9)
"""Shares of a block's largest number that its scale may be made for: the larger ones are cut off where the others gain
more than they lose."""
_DAMPING = 0.01
_AT_ONCE = 1 << 22
"""Numbers that are rounded at a time."""
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

    @property
    def numbers(self) -> Tensor:
        """The weight that it stands for: (N, K) float32, in the order of products in which runtimes compute it."""
        scales = self.scales * self.whole
        return self.values * scales.repeat_interleave(self.values.shape[1] // scales.shape[1], dim=1)


def _whole_scale(weight: Tensor, form: Format) -> Tensor:
    """By which the scales of ``weight`` are multiplied."""
    if form.scale_grid is None:
        return torch.ones(())
    return (weight.abs().max() / (form.grid.largest * form.scale_grid.largest)).clamp_min(_SMALLEST)


def _scales(blocks: Tensor, form: Format, whole: Tensor, importance: Tensor | None) -> Tensor:
    """Scales (N, n) of ``blocks`` (N, n, b): of several, those that lose least, by ``importance`` (n, b) or squares."""
    largest = blocks.abs().amax(-1)
    found, least = None, None
    for clip in _CLIPS:
        scales = (largest * clip / form.grid.largest / whole).clamp_min(_SMALLEST)
        if form.scale_grid is not None:
            scales = form.scale_grid.nearest(scales)
        effective = (scales * whole).unsqueeze(-1).clamp_min(_SMALLEST)
        lost = (form.grid.nearest(blocks / effective) * effective - blocks).square()
        error = (lost if importance is None else lost * importance).sum(-1)
        if found is None or least is None:
            found, least = scales, error
        else:
            better = error < least
            found, least = torch.where(better, scales, found), torch.where(better, error, least)
    assert found is not None
    return found


def round_to_nearest(weight: Tensor, form: Format, block: int) -> QuantizedMatrix:
    """``weight`` (N, K) float32 rounded number by number."""
    whole = _whole_scale(weight, form)
    values, scales = torch.empty_like(weight), weight.new_empty(weight.shape[0], weight.shape[1] // block)
    # By rows, so that what is needed beside the weight does not grow with it.
    rows = max(1, _AT_ONCE // weight.shape[1])
    for part, rounded, found in zip(weight.split(rows), values.split(rows), scales.split(rows), strict=True):
        blocks = part.unflatten(1, (-1, block))
        found.copy_(_scales(blocks, form, whole, None))
        effective = (found * whole).unsqueeze(-1).clamp_min(_SMALLEST)
        rounded.copy_(form.grid.nearest(blocks / effective).flatten(1))
    return QuantizedMatrix(values, scales, whole)


def _inverse_factor(products: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped ``products`` (K, K)."""
    diagonal = products.diagonal()
    damped = products + torch.diag_embed(torch.full_like(diagonal, _DAMPING * diagonal.mean().item()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def gptq(weight: Tensor, products: Tensor, form: Format, block: int) -> QuantizedMatrix:
    """``weight`` (N, K) float32 rounded so that its products with what was seen lose little.

    ``products`` (K, K) float32 is the sum of x x^T over the rows x that the weight was multiplied with. Inputs that
    were always zero are rounded to nearest. Raises :class:`torch.linalg.LinAlgError` where ``products`` is not finite.
    """
    weight, products = weight.clone(), products.clone()
    inputs = weight.shape[1]
    dead = products.diagonal() == 0
    products.diagonal()[dead] = 1.0
    importance = products.diagonal().clone()
    factor = _inverse_factor(products)
    whole = _whole_scale(weight, form)
    values, scales = torch.empty_like(weight), weight.new_empty(weight.shape[0], inputs // block)
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
                scales[:, place // block] = _scales(numbers.unsqueeze(1), form, whole, weights[None])[:, 0]
            scale = (scales[:, place // block] * whole).clamp_min(_SMALLEST)
            values[:, place] = form.grid.nearest(part[:, column] / scale)
            error = (part[:, column] - values[:, place] * scale) / triangle[column, column]
            errors[:, column] = error
            part[:, column + 1 :] -= error.unsqueeze(1) * triangle[column, column + 1 :]
        weight[:, end:] -= errors @ factor[start:end, end:]
    return QuantizedMatrix(values, scales, whole)
