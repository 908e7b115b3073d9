"""Weights of products that a bundle stores in few bits: their parts by name, and whether they are all there.

A weight (N, K) called `name` is stored as `name.int4` (or another format's name), whose bytes are those of ONNX's
tensor (K, N), and `name.int4_scale`; names and dtypes say all there is to know. K inputs, N outputs, b inputs a block.

| format | codes | `_scale` | |
| --- | --- | --- | --- |
| int4 | U8 (K N / 2), two codes a byte | F32 (K / b, N) | `_zero` U8 (K / b N / 2), codes that stand for 0, or none |
| int8 | I8 (K, N) | F32 (N,) | |
| fp8 | F8_E4M3 (K, N) | F32 (N,) | `_input` F32 (), the scale of what is multiplied with it, or none |
| nvfp4 | U8 (K N / 2), two codes a byte | F8_E4M3 (K / 16, N) | `_whole` F32 (), by which scales are multiplied |

Imports no framework.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from d3tom_export.config import QUANT_FORMATS, QuantFormat
from d3tom_export.errors import D3tomError, listing
from d3tom_export.trust.tensors import StoredTensor

_PART = re.compile(rf"(?P<name>.+)\.(?P<format>{'|'.join(QUANT_FORMATS)})(?P<part>_scale|_whole|_input|_zero)?")
_CODES = {"int4": "U8", "int8": "I8", "fp8": "F8_E4M3", "nvfp4": "U8"}
_PACKED = ("int4", "nvfp4")
_PARTS: dict[QuantFormat, tuple[str, ...]] = {
    "int4": ("_scale",),
    "int8": ("_scale",),
    "fp8": ("_scale",),
    "nvfp4": ("_scale", "_whole"),
}
_MAY_HAVE: dict[QuantFormat, tuple[str, ...]] = {"int4": ("_zero",), "fp8": ("_input",)}
SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class QuantizedTensor:
    """Where the parts of a quantized weight lie."""

    format: QuantFormat
    shape: tuple[int, ...]
    """(N, K), as the model has it."""
    codes: StoredTensor
    scale: StoredTensor
    whole: StoredTensor | None = None
    input_scale: StoredTensor | None = None
    zero: StoredTensor | None = None
    """The codes that stand for 0, one for each scale and packed as the others; None: that of 0 does."""

    dtype = "F32"
    """What a graph multiplies with, and the oracle too."""

    @property
    def name(self) -> str:
        """The weight's, as its file would have it unquantized."""
        return self.codes.name.removesuffix(f".{self.format}")

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """All of them, whose names begin with :attr:`name`."""
        parts = self.codes, self.scale, self.whole, self.input_scale, self.zero
        return tuple(part for part in parts if part is not None)

    @property
    def length(self) -> int:
        """Bytes of all parts."""
        return sum(part.length for part in self.parts)

    @property
    def block(self) -> int:
        """Inputs that share a scale, b: all of them, where an output has one."""
        return self.shape[1] if len(self.scale.shape) == 1 else self.shape[1] // self.scale.shape[0]


def part_name(name: str, form: QuantFormat, part: str = "") -> str:
    """The name that a part of weight ``name`` is stored by; ``part`` "" are the codes."""
    return f"{name}.{form}{part}"


def format_of(name: str) -> QuantFormat | None:
    """The format of the weight that a part of this ``name`` is of; None where it is no such part's."""
    match = _PART.fullmatch(name)
    return None if match is None else next(form for form in QUANT_FORMATS if form == match["format"])


def with_quantized(stored: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor | QuantizedTensor]:
    """``stored`` with quantized weights in the place of their parts.

    Raises :class:`D3tomError` where parts are missing, there twice over, or do not fit one another.
    """
    plain: dict[str, StoredTensor] = {}
    parts: dict[str, dict[tuple[str, str], StoredTensor]] = {}
    for name, tensor in stored.items():
        match = _PART.fullmatch(name)
        if match is None:
            plain[name] = tensor
        else:
            parts.setdefault(match["name"], {})[match["format"], match["part"] or ""] = tensor
    quantized: dict[str, QuantizedTensor] = {}
    problems = []
    for name, found in parts.items():
        formats = sorted({form for form, _ in found})
        if len(formats) > 1 or name in plain:
            problems.append(f"{name} is there as {listing([*formats, *(['itself'] if name in plain else [])])}")
            continue
        form = next(form for form in QUANT_FORMATS if form == formats[0])
        of_parts = {part: tensor for (_, part), tensor in found.items()}
        weight, problem = _assembled(form, of_parts)
        if weight is None:
            problems.append(f"{name} ({form}) {problem}")
        else:
            quantized[name] = weight
    if problems:
        raise D3tomError(
            f"The quantized weights in {folder} do not fit together: {listing(problems, 8)}. Fetch the bundle again "
            "from where it was built, or rebuild it."
        )
    return {**plain, **quantized}


def _assembled(form: QuantFormat, parts: Mapping[str, StoredTensor]) -> tuple[QuantizedTensor | None, str]:
    """The weight of ``parts``, or None and what is wrong with them."""
    missing = [f"{form}{part}" for part in ("", *_PARTS[form]) if part not in parts]
    if missing:
        return None, f"lacks {listing(missing)}"
    further = [f"{form}{part}" for part in parts if part not in ("", *_PARTS[form], *_MAY_HAVE.get(form, ()))]
    if further:
        return None, f"has {listing(further)} too"
    codes, scale = parts[""], parts["_scale"]
    packed = form in _PACKED
    if codes.dtype != _CODES[form] or len(codes.shape) != (1 if packed else 2) or 0 in codes.shape:
        return None, f"has codes of {codes.dtype} and shape {list(codes.shape)}, expected {_CODES[form]}"
    outputs = scale.shape[-1] if scale.shape else 0
    inputs = 2 * codes.shape[0] // max(outputs, 1) if packed else codes.shape[0]
    fits = scale.dtype == ("F8_E4M3" if form == "nvfp4" else "F32") and (
        len(scale.shape) == 2
        and outputs > 0
        and inputs * outputs == 2 * codes.shape[0]
        and scale.shape[0] > 0
        and inputs % scale.shape[0] == 0
        and inputs // scale.shape[0] >= SMALLEST_BLOCK
        if packed
        else scale.shape == codes.shape[1:]
    )
    if not fits:
        return None, (
            f"has scales of {scale.dtype} and shape {list(scale.shape)} for codes of shape {list(codes.shape)}"
        )
    single = [part for part in ("_whole", "_input") if part in parts]
    if any(parts[part].dtype != "F32" or parts[part].shape != () for part in single):
        return None, f"has {listing(single)} that are not one float32 number each"
    zero = parts.get("_zero")
    if zero is not None and (zero.dtype != "U8" or 2 * math.prod(zero.shape) != math.prod(scale.shape)):
        return None, (
            f"has zero points of {zero.dtype} and shape {list(zero.shape)} for scales of shape {list(scale.shape)}"
        )
    return QuantizedTensor(form, (outputs, inputs), codes, scale, parts.get("_whole"), parts.get("_input"), zero), ""
