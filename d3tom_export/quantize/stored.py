"""Quantized weights to and from the parts that a file has of them (:mod:`d3tom_export.checkpoint.quantized`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from d3tom_export.checkpoint.quantized import QuantizedTensor
from d3tom_export.quantize.grids import pack, unpack
from d3tom_export.quantize.matrices import FORMATS, Format, QuantizedMatrix
from d3tom_export.trust.tensors import StoredTensor

_CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Of formats whose codes have a dtype of their own; those of four bits lie in bytes."""


def to_parts(matrix: QuantizedMatrix, form: Format) -> dict[str, Tensor]:
    """The parts that are stored, by the ends of their names; inputs first, as ONNX multiplies with them."""
    codes = pack(form.grid.encode(matrix.values.T.contiguous()), form.grid.bits)
    codes = codes.view(_CODE_DTYPES.get(form.name, torch.uint8))
    scales = matrix.scales.T.contiguous()
    if form.scale_grid is not None:
        scales = form.scale_grid.encode(scales).view(torch.float8_e4m3fn)
        return {"": codes, "_scale": scales, "_whole": matrix.whole}
    parts = {"": codes, "_scale": scales if form.block is not None else scales[0]}
    if matrix.zeros is not None:
        parts["_zero"] = pack(form.grid.encode(matrix.zeros.T.contiguous()), form.grid.bits)
    if matrix.input_scale is not None:
        parts["_input"] = matrix.input_scale
    return parts


def from_parts(parts: Mapping[str, Tensor], form: Format) -> QuantizedMatrix:
    """What :func:`to_parts` took apart."""
    scales = parts["_scale"]
    codes = unpack(parts[""].view(torch.uint8), form.grid.bits).view(-1, scales.shape[-1])
    values = form.grid.decode(codes).T
    if form.scale_grid is not None:
        scales = form.scale_grid.decode(scales.view(torch.uint8))
    scales = scales[None] if scales.dim() == 1 else scales
    zeros = None
    if "_zero" in parts:
        zeros = form.grid.decode(unpack(parts["_zero"], form.grid.bits)).view(scales.shape).T
    return QuantizedMatrix(values, scales.T, parts.get("_whole", torch.ones(())), parts.get("_input"), zeros)


def read_quantized(tensor: QuantizedTensor) -> Tensor:
    """The weight (N, K) float32 that a quantized one stands for, to the bit what a runtime dequantizes."""
    places = {"": tensor.codes, "_scale": tensor.scale}
    if tensor.whole is not None:
        places["_whole"] = tensor.whole
    if tensor.zero is not None:
        places["_zero"] = tensor.zero
    parts = {part: _read(place) for part, place in places.items()}
    return from_parts(parts, FORMATS[tensor.format]).numbers.contiguous()


def read_input_scale(tensor: QuantizedTensor) -> float | None:
    """The scale at which what a weight is multiplied with is rounded; None: it is taken as it is."""
    return None if tensor.input_scale is None else _read(tensor.input_scale).item()


def _read(place: StoredTensor) -> Tensor:
    with safe_open(place.source, framework="pt") as file:
        return file.get_tensor(place.name)
