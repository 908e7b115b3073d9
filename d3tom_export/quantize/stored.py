"""Quantized weights to and from the parts that a file has of them (:mod:`d3tom_export.checkpoint.quantized`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from d3tom_export.checkpoint.quantized import QuantizedTensor
from d3tom_export.errors import D3tomError
from d3tom_export.quantize.grids import pack, unpack
from d3tom_export.quantize.matrices import FORMATS, Format, QuantizedMatrix, largest_of, round_to_nearest
from d3tom_export.trust.tensors import StoredTensor

_CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Of formats whose codes have a dtype of their own; those of four bits lie in bytes."""
_AT_ONCE = 1 << 22
"""Numbers whose codes are made or read at a time."""


def to_parts(matrix: QuantizedMatrix, form: Format) -> dict[str, Tensor]:
    """The parts that are stored, by the ends of their names; inputs first, as ONNX multiplies with them."""
    outputs, inputs = matrix.values.shape
    return _joined((_rows_of(matrix, here) for here in _pieces(outputs, inputs)), (outputs, inputs), form)


def nearest_parts(weight: Tensor, form: Format, block: int) -> dict[str, Tensor]:
    """The parts of ``weight`` (N, K) in any float dtype, rounded number by number.

    Beside it memory holds its codes, one a byte, and what a piece of its rows takes. Raises ``ValueError`` where it is
    not finite.
    """
    largest = largest_of(weight)
    pieces = (round_to_nearest(weight[here].float(), form, block, largest) for here in _pieces(*weight.shape))
    return _joined(pieces, (weight.shape[0], weight.shape[1]), form)


def _pieces(count: int, width: int, multiple: int = 1) -> Iterator[slice]:
    """``count`` rows of ``width`` numbers by pieces, which begin at a multiple."""
    step = multiple * max(1, _AT_ONCE // (multiple * width))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _rows_of(matrix: QuantizedMatrix, rows: slice) -> QuantizedMatrix:
    zeros = None if matrix.zeros is None else matrix.zeros[rows]
    return matrix._replace(values=matrix.values[rows], scales=matrix.scales[rows], zeros=zeros)


def _joined(pieces: Iterable[QuantizedMatrix], shape: tuple[int, int], form: Format) -> dict[str, Tensor]:
    """The parts of a weight of ``shape`` (N, K) from pieces of its rows, one after another."""
    outputs, inputs = shape
    codes, start = torch.empty(inputs, outputs, dtype=torch.uint8), 0
    scales, zeros, last = torch.empty(0), torch.empty(0), None
    for last in pieces:
        here = slice(start, start + len(last.values))
        if start == 0:
            scales = torch.empty(last.scales.shape[1], outputs)
            zeros = torch.empty_like(scales) if last.zeros is not None else zeros
        codes[:, here] = form.grid.encode(last.values).T
        scales[:, here] = last.scales.T
        if last.zeros is not None:
            zeros[:, here] = last.zeros.T
        start = here.stop
    assert last is not None
    packed = pack(codes, form.grid.bits).view(_CODE_DTYPES.get(form.name, torch.uint8))
    if form.scale_grid is not None:
        return {"": packed, "_scale": form.scale_grid.encode(scales).view(torch.float8_e4m3fn), "_whole": last.whole}
    parts = {"": packed, "_scale": scales if form.block is not None else scales[0]}
    if last.zeros is not None:
        parts["_zero"] = pack(form.grid.encode(zeros), form.grid.bits)
    if last.input_scale is not None:
        parts["_input"] = last.input_scale
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


def numbers_of(parts: Mapping[str, Tensor], form: Format) -> Tensor:
    """The weight (N, K) float32 that ``parts`` stand for, beside which memory holds a piece of its inputs."""
    codes, scales, bits = parts[""], parts["_scale"], form.grid.bits
    outputs = scales.shape[-1]
    inputs = codes.numel() * 8 // bits // outputs
    blocked = scales.dim() == 2
    block = inputs // scales.shape[0] if blocked else 1
    numbers = torch.empty(outputs, inputs)
    for here in _pieces(inputs, outputs, 2 * block):  # of two blocks zero points fill bytes, whatever the outputs
        first, end = here.start // block, here.stop // block
        some = {**parts, "": codes[here]}
        if bits == 4:
            some[""] = codes[here.start * outputs // 2 : here.stop * outputs // 2]
        if blocked:
            some["_scale"] = scales[first:end]
        if "_zero" in parts:
            some["_zero"] = parts["_zero"].flatten()[first * outputs // 2 : end * outputs // 2]
        numbers[:, here] = from_parts(some, form).numbers
    return numbers


def read_quantized(tensor: QuantizedTensor) -> Tensor:
    """The weight (N, K) float32 that a quantized one stands for, to the bit what a runtime dequantizes.

    Raises :class:`D3tomError` where that is not finite, or a scale is negative: no build writes such parts.
    """
    places = {"": tensor.codes, "_scale": tensor.scale}
    if tensor.whole is not None:
        places["_whole"] = tensor.whole
    if tensor.zero is not None:
        places["_zero"] = tensor.zero
    parts = {part: _read(place) for part, place in places.items()}
    numbers = numbers_of(parts, FORMATS[tensor.format])
    scales = [parts[part].float() for part in ("_scale", "_whole") if part in parts]
    # The extremes of what holds a NaN are NaN.
    if not torch.stack(numbers.aminmax()).isfinite().all() or any(each.min() < 0 for each in scales):
        raise _damaged(tensor, "codes or scales that stand for no number")
    return numbers


def read_input_scale(tensor: QuantizedTensor) -> float | None:
    """The scale at which what a weight is multiplied with is rounded; None: it is taken as it is.

    Raises :class:`D3tomError` for one that is not above 0 and finite.
    """
    if tensor.input_scale is None:
        return None
    scale = float(_read(tensor.input_scale).item())
    if not 0 < scale < math.inf:
        raise _damaged(tensor, f"{scale:g} for the scale of its inputs, expected a number above 0")
    return scale


def _damaged(tensor: QuantizedTensor, what: str) -> D3tomError:
    return D3tomError(
        f"{tensor.name} ({tensor.format}) in {tensor.codes.file} has {what}. Fetch the bundle again from where it was "
        "built, or rebuild it."
    )


def _read(place: StoredTensor) -> Tensor:
    with safe_open(place.source, framework="pt") as file:
        return file.get_tensor(place.name)
