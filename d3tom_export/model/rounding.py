"""Products that round their input to float8 (e4m3) first, at a scale that was measured: what fp8 kernels multiply with.

The arithmetic is that of ONNX's QuantizeLinear and DequantizeLinear, which stand before these products in the graphs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_E4M3 = torch.finfo(torch.float8_e4m3fn)


def rounded_to_fp8(x: Tensor, scale: float) -> Tensor:
    """``x`` of any shape and float dtype as float8 has it at ``scale``.

    Divided in float32, held to the largest number that there is, rounded to nearest with ties to even, multiplied; in
    the dtype of ``x`` again. A NaN stays one.
    """
    codes = (x.float() / scale).clamp(_E4M3.min, _E4M3.max).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


class RoundedLinear(nn.Linear):
    """A product (..., K) -> (..., N) that rounds what it is given. :func:`round_input` makes one."""

    input_scale: float

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rounded_to_fp8(x, self.input_scale), self.weight, self.bias)


def round_input(linear: nn.Module, scale: float) -> None:
    """Let ``linear``, a plain product, round its input at ``scale`` from now on. Its parameters stay as they are."""
    assert type(linear) is nn.Linear
    linear.__class__ = RoundedLinear
    linear.input_scale = scale  # type: ignore[assignment]


def stop_rounding(model: nn.Module) -> bool:
    """Make every product of ``model`` a plain one again; returns whether any was not."""
    rounding = [module for module in model.modules() if isinstance(module, RoundedLinear)]
    for module in rounding:
        module.__class__ = nn.Linear  # type: ignore[assignment]
    return bool(rounding)
