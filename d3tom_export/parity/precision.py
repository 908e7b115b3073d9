"""A model with its precision's roundings left out or put in: what PyTorch's witness runs (parity/bounds.py)."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from d3tom_export.model.lavida import Lavida
from d3tom_export.model.rounding import stop_rounding

_LEVELS = 127.0
_SMALLEST = 1e-30


class _Int8Linear(nn.Linear):
    """A product as the int8 graphs compute it (cpu/int8.py): one scale for each weight column and each row."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_rounded(x), _rounded(self.weight), self.bias)


def _rounded(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(_SMALLEST) / _LEVELS
    return (x / scale).round() * scale


def in_float32(model: Lavida) -> Lavida:
    """A copy of ``model`` with the very same weights that computes in float32."""
    wide = {id(parameter): nn.Parameter(parameter.detach().float(), False) for parameter in model.parameters()}
    return copy.deepcopy(model, wide)


def in_int8(model: Lavida) -> Lavida:
    """``model`` with its language model's products in int8; the two share their weights."""
    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in shared.transformer.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Int8Linear
    return shared


def witness_model(model: Lavida, precision: str) -> Lavida:
    """The model whose distance from ``model``, the oracle's, is what ``precision`` costs.

    Of float32 that is what rounding the products' inputs costs, in a model that does.
    """
    if precision == "int8":
        return in_int8(model)
    wide = in_float32(model)
    if precision == "fp32":
        stop_rounding(wide)
    return wide
