"""Numbers that few bits hold: the values of a format, what is nearest to a number among them, and their bytes.

Formats are ONNX's: INT4 and INT8 in two's complement, FLOAT8E4M3FN, FLOAT4E2M1; of those of four bits two lie in a
byte, the first in its lower half. The lowest integer is left out where there is no zero point, which TensorRT does not
take: a scale that maps the largest number of a block to an end of a symmetric range serves both signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The values that a code of few bits stands for."""

    bits: int
    largest: float
    nearest: Callable[[Tensor], Tensor]
    """float32 numbers to the nearest value, ties to even; numbers beyond the largest become it."""
    encode: Callable[[Tensor], Tensor]
    """Values to codes (uint8, one a byte)."""
    decode: Callable[[Tensor], Tensor]
    """Codes to float32 values."""
    lowest: float | None = None
    """The other end, where that is not the largest value's opposite."""


def _integers(bits: int, *, every: bool = False) -> Grid:
    """All integers of so many ``bits``, or but for ``every`` as many of either sign."""
    largest = 2 ** (bits - 1) - 1
    lowest = -largest - every
    mask = 2**bits - 1

    def decode(codes: Tensor) -> Tensor:
        values = codes.to(torch.int16)
        return torch.where(values > largest, values - mask - 1, values).float()

    return Grid(
        bits,
        float(largest),
        lambda numbers: numbers.round().clamp(lowest, largest),
        lambda values: (values.to(torch.int16) & mask).to(torch.uint8),
        decode,
        float(lowest) if every else None,
    )


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1_ENDS = (_E2M1[:-1] + _E2M1[1:]) / 2
"""Halfway between two values; a number there goes to the one with an even code."""


def _nearest_e2m1(numbers: Tensor) -> Tensor:
    size = numbers.abs()
    down = torch.bucketize(size, _E2M1_ENDS)  # at an end, the lower
    at_end = size == _E2M1_ENDS[down.clamp(max=len(_E2M1_ENDS) - 1)]
    index = torch.where(at_end & (down % 2 == 1) & (down < len(_E2M1_ENDS)), down + 1, down)
    return torch.copysign(_E2M1[index], numbers)


def _encode_e2m1(values: Tensor) -> Tensor:
    index = torch.bucketize(values.abs(), _E2M1)
    return (index + 8 * (torch.signbit(values))).to(torch.uint8)


def _decode_e2m1(codes: Tensor) -> Tensor:
    values = torch.cat([_E2M1, -_E2M1])
    return values[codes.long()]


_FP8 = torch.finfo(torch.float8_e4m3fn)

INT4, INT8 = _integers(4), _integers(8)
INT4_WHOLE = _integers(4, every=True)
"""With a zero point beside each scale."""
E4M3 = Grid(
    8,
    _FP8.max,
    lambda numbers: numbers.clamp(_FP8.min, _FP8.max).to(torch.float8_e4m3fn).float(),
    lambda values: values.to(torch.float8_e4m3fn).view(torch.uint8),
    lambda codes: codes.view(torch.float8_e4m3fn).float(),
)
E2M1 = Grid(4, 6.0, _nearest_e2m1, _encode_e2m1, _decode_e2m1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as they lie in a file: as they are, or flat (n / 2,) where two are in a byte, of an even number."""
    if bits == 8:
        return codes
    flat = codes.flatten()
    return flat[0::2] | (flat[1::2] << 4)


def unpack(stored: Tensor, bits: int) -> Tensor:
    """What :func:`pack` packed; of four bits flat."""
    return stored if bits == 8 else torch.stack([stored & 0xF, stored >> 4], dim=-1).flatten()
