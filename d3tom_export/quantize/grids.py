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
_E2M1_BY_CODE = torch.cat([_E2M1, -_E2M1])
_EXPONENT = 0x7F800000
"""Of a float32's bits; alone they are the power of two below it."""


def _nearest_float(largest: float, smallest: float, steps: int) -> Callable[[Tensor], Tensor]:
    """To a float of few bits: ``steps`` values from a power of two to the next, and from 0 to the ``smallest`` power.

    Nine scales are tried for every block: a search among the values, or a conversion there and back, takes many times
    as long.
    """

    def nearest(numbers: Tensor) -> Tensor:
        found = numbers.clamp(-largest, largest)
        powers = (found.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_min_(smallest)
        # Powers of two take no digit, so only `round_` rounds; an even multiple of a step has an even code.
        return found.mul_(steps).div_(powers).round_().mul_(powers.div_(steps))

    return nearest


def _encode_e2m1(values: Tensor) -> Tensor:
    size = values.abs()
    codes = torch.minimum(size * 2, size + 2).clamp_max_(size.mul_(0.5).add_(4))  # three lines through the eight values
    return codes.add_(values.signbit(), alpha=8).to(torch.uint8)


def _decode_e2m1(codes: Tensor) -> Tensor:
    return _E2M1_BY_CODE.index_select(0, codes.flatten().int()).view(codes.shape)


_FP8 = torch.finfo(torch.float8_e4m3fn)

INT4, INT8 = _integers(4), _integers(8)
INT4_WHOLE = _integers(4, every=True)
"""With a zero point beside each scale."""
E4M3 = Grid(
    8,
    _FP8.max,
    _nearest_float(_FP8.max, _FP8.smallest_normal, 8),
    lambda values: values.to(torch.float8_e4m3fn).view(torch.uint8),
    lambda codes: codes.view(torch.float8_e4m3fn).float(),
)
E2M1 = Grid(4, 6.0, _nearest_float(6.0, 1.0, 2), _encode_e2m1, _decode_e2m1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as they lie in a file: as they are, or flat (n / 2,) where two are in a byte, of an even number."""
    if bits == 8:
        return codes
    flat = codes.flatten()
    packed = flat[1::2] << 4
    packed |= flat[0::2]
    return packed


def unpack(stored: Tensor, bits: int) -> Tensor:
    """What :func:`pack` packed; of four bits flat."""
    return stored if bits == 8 else torch.stack([stored & 0xF, stored >> 4], dim=-1).flatten()
