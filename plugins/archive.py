"""Compiled kernels as one block of bytes: what an engine carries in its plan and what the C++ library embeds.

Little-endian. ``D3TMKRN1``, the number of kernels (uint32), zero (uint32); then each kernel: a header of 96 bytes, the
image, zeros up to a multiple of 8. `cpp/kernel_archive.h` reads the same format; change both together with the magic.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from d3tom_export.errors import D3tomError
from d3tom_export.plugins.launch import DTYPES, Variant, spec

MAGIC = b"D3TMKRN1"
_HEAD = struct.Struct("<8sII")
_ENTRY = struct.Struct("<24s32s10I")
_COMPATIBLE = {80, 86, 89}
_DTYPE_CODES = {**{dtype: code for code, dtype in enumerate(DTYPES)}, "": len(DTYPES)}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel, for one GPU architecture."""

    variant: Variant
    sm: int
    """Compute capability without its point: 89, 120."""
    portable: bool
    """True: PTX, which the driver translates for any GPU from ``sm`` on. False: a cubin."""
    symbol: str
    """The entry's name in the image."""
    threads: int
    """A program's threads, one dimension."""
    shared: int
    """Its dynamic shared memory in bytes."""
    scratch: int
    """Pointers that Triton declares after the kernel's own parameters; they are passed as null."""
    image: bytes


def pack(kernels: Iterable[Kernel]) -> bytes:
    """``kernels`` as bytes, in a canonical order: equal sets of kernels give equal bytes."""
    ordered = sorted(kernels, key=lambda kernel: (kernel.sm, kernel.portable, kernel.variant))
    parts = [_HEAD.pack(MAGIC, len(ordered), 0)]
    for kernel in ordered:
        numbers = (kernel.sm, kernel.portable, kernel.threads, kernel.shared, kernel.scratch)
        parts.append(
            _ENTRY.pack(
                kernel.variant.name.encode(),
                kernel.symbol.encode(),
                _DTYPE_CODES[kernel.variant.dtype],
                *numbers,
                *grid_blocks(kernel.variant),
                len(kernel.image),
                0,
            )
        )
        parts.append(kernel.image + bytes(-len(kernel.image) % 8))
    return b"".join(parts)


def unpack(data: bytes) -> tuple[Kernel, ...]:
    """The kernels of ``data``.

    :raises D3tomError: not an archive of this version, or cut short.
    """
    try:
        magic, count, _ = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise ValueError(f"it begins with {magic!r}, not {MAGIC!r}")
        kernels, at = [], _HEAD.size
        for _ in range(count):
            name, symbol, dtype, sm, portable, threads, shared, scratch, *_, length, _ = _ENTRY.unpack_from(data, at)
            at += _ENTRY.size
            if at + length > len(data):
                raise ValueError(f"it ends within {symbol!r}")
            variant = Variant(_text(name), {code: name for name, code in _DTYPE_CODES.items()}[dtype])
            spec(variant)
            image = data[at : at + length]
            kernels.append(Kernel(variant, sm, bool(portable), _text(symbol), threads, shared, scratch, image))
            at += length + -length % 8
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise D3tomError(
            f"The merge plugin's compiled kernels ({len(data)} bytes) cannot be read: {error}. The engine was built by "
            "another version of d3tom-export or is damaged; build it again."
        ) from error
    return tuple(kernels)


def grid_blocks(variant: Variant) -> tuple[int, int]:
    """Tile sizes along the first two grid dimensions, 1 where a dimension is not tiled."""
    constants = spec(variant).constants
    if variant.name == "order":
        return constants["BLOCK_V"], 1
    if variant.name.startswith("sum"):
        return constants["BLOCK_W"], 1
    return constants["BLOCK_V"], constants["BLOCK_K"]


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii")


def select(kernels: Iterable[Kernel], sm: int) -> dict[Variant, Kernel]:
    """The kernels that run on a GPU of ``sm``, the best of each variant.

    A cubin runs on its own architecture. Those of 8.0 and 8.6 also run on later desktop GPUs of that generation; the
    embedded 8.7 stands alone, and from Hopper on Triton uses instructions of one architecture only. PTX for an earlier
    architecture is the last resort. Source: CUDA programming guide, "Binary Compatibility".
    """

    def fits(kernel: Kernel) -> bool:
        if kernel.portable:
            return kernel.sm <= sm
        return kernel.sm == sm or (kernel.sm < sm and {kernel.sm, sm} <= _COMPATIBLE)

    usable = [kernel for kernel in kernels if fits(kernel)]
    return {kernel.variant: kernel for kernel in sorted(usable, key=lambda kernel: (not kernel.portable, kernel.sm))}
