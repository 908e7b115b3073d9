"""Which weights are stored in few bits, which are left as they are, and why. Imports no framework."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d3tom_export.checkpoint.quantized import SMALLEST_BLOCK, QuantizedTensor
from d3tom_export.checkpoint.tensors import EMBEDDING_TABLE, LANGUAGE_HEAD, LAYERS, TOWER, Shapes
from d3tom_export.config import QUANT_FORMATS, QUANT_METHOD, QuantFormat
from d3tom_export.errors import CallError, D3tomError, listing

BLOCKS: dict[QuantFormat, int | None] = {"int4": 128, "int8": None, "fp8": None, "nvfp4": 16}
"""Inputs that share a scale unless told otherwise; None: an output's all share one."""

CODE_BITS: dict[QuantFormat, int] = {"int4": 4, "int8": 8, "fp8": 8, "nvfp4": 4}
_BLOCK_MATRICES = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
_PROJECTOR = "model.mm_projector."


@dataclass(frozen=True)
class QuantizeRequest:
    """What a build is to store in few bits.

    Raises :class:`D3tomError` for a format that is unknown and for a block that the format does not have.
    """

    format: QuantFormat
    block: int | None = None
    """Inputs that share a scale, of int4; None: 128."""
    head: bool = False
    """Whether the language head is quantized too."""
    tower: bool = False
    """Whether the vision tower and the projector are."""
    samples: int = 0
    """Questions whose products the blocks' weights are rounded by, with GPTQ; 0: each number to the nearest."""
    activations: bool = False
    """Whether what the blocks' weights are multiplied with is rounded too, of fp8: at scales that the samples give."""
    asymmetric: bool = False
    """Whether blocks of int4 have a zero point beside their scale, which TensorRT does not take."""

    def __post_init__(self) -> None:
        if self.format not in QUANT_FORMATS:
            raise CallError(
                f"Weights cannot be quantized to {str(self.format)!r}. Give one of {listing(QUANT_FORMATS)}."
            )
        if self.samples < 0:
            raise D3tomError(f"Weights cannot be rounded by {self.samples} samples. Give 0 for none.")
        if self.asymmetric and self.format != "int4":
            raise D3tomError(f"Zero points are for int4 alone, whose sixteen values are few; {self.format} has none.")
        if self.activations and self.format != "fp8":
            raise D3tomError(
                f"Activations are rounded to fp8 alone, beside weights in fp8, not in {self.format}: one scale for a "
                "whole tensor needs a format whose digits do not depend on a number's size."
            )
        if self.activations and not self.samples:
            raise D3tomError(
                "Scales of activations are measured on samples. Say how many with --quantize-samples, 16 for instance."
            )
        if self.block is None:
            return
        if self.format != "int4":
            scales = "blocks of 16" if self.format == "nvfp4" else "one scale for each output"
            raise D3tomError(f"A block is chosen for int4 alone; {self.format} has {scales}.")
        if self.block < SMALLEST_BLOCK or self.block & (self.block - 1):
            raise D3tomError(f"A block of {self.block} cannot be: expected 16, 32, 64, 128 or another power of two.")


@dataclass
class QuantizePlan:
    """The weights to be quantized, and why the others are not."""

    format: QuantFormat
    blocks: dict[str, int] = field(default_factory=dict)
    """Inputs that share a scale, by the model's own names."""
    kept: dict[str, str] = field(default_factory=dict)
    """Reasons of the others."""
    inputs: set[str] = field(default_factory=set)
    """Weights whose other side is rounded too."""
    asymmetric: bool = False
    """Whether blocks have zero points."""

    def marks(self, samples: int = 0) -> dict[str, Any]:
        """What ``config.json`` says of it, where other libraries look before they read any weight.

        ``samples`` is how many it was rounded by, the model's first ones.
        """
        marks: dict[str, Any] = {"quant_method": QUANT_METHOD, "format": self.format}
        marks |= {"activations": self.format} if self.inputs else {}
        return {"quantization_config": marks | ({"samples": samples} if samples else {})}

    def describe(self) -> str:
        """For the user."""
        kept = "; ".join(f"{count} {reason}" for reason, count in Counter(self.kept.values()).most_common())
        inputs = f", what {len(self.inputs)} of them are multiplied with too" if self.inputs else ""
        zeros = " with zero points" if self.asymmetric else ""
        return f"{len(self.blocks)} weights in {self.format}{zeros}{inputs}. As they are: {kept}."


def block_for(wanted: int | None, inputs: int) -> int | None:
    """The block for a weight of ``inputs``: ``wanted`` or the largest half, quarter, ... of it that divides them.

    All inputs where ``wanted`` is None; None where no block of 16 or more divides them.
    """
    block = inputs if wanted is None else wanted
    while block >= SMALLEST_BLOCK:
        if inputs % block == 0:
            return block
        block //= 2
    return None


def plan_of(shapes: Shapes, request: QuantizeRequest) -> QuantizePlan:
    """What ``request`` means for a model with tensors of ``shapes``, by its own names."""
    plan = QuantizePlan(request.format, asymmetric=request.asymmetric)
    for name, shape in shapes.items():
        reason = _reason(name, shape, request)
        block = None
        if reason is None:
            wanted = request.block or BLOCKS[request.format]
            block = block_for(wanted, shape[1])
            if block is None:
                reason = f"with {shape[1]} inputs, which no block divides"
            elif request.asymmetric and shape[0] * (shape[1] // block) % 2:
                block, reason = None, "with an odd number of zero points, of which two lie in a byte"
        if block is None:
            plan.kept[name] = str(reason)
        else:
            plan.blocks[name] = block
    if request.activations:
        plan.inputs = {name for name in plan.blocks if name.startswith(LAYERS)}
    if not plan.blocks:
        raise D3tomError(
            f"Nothing of this model can be stored in {request.format}: no block of {SMALLEST_BLOCK} or more divides "
            "the inputs of any of its products."
        )
    return plan


def impossible_quantized(name: str, shape: tuple[int, ...], rounds_input: bool) -> str | None:
    """What is wrong with a weight that is stored in few bits, if no request leads to that; None: nothing.

    ``rounds_input`` tells whether a scale of its inputs is stored.
    """
    reason = _reason(name, shape, QuantizeRequest("int8", head=True, tower=True))
    if reason is not None:
        return f"is quantized, which is left as it is: {reason}"
    if rounds_input and not name.startswith(LAYERS):
        return "has a scale of inputs, which the blocks' products alone have"
    return None


def stored_bytes(request: QuantizeRequest, outputs: int, inputs: int, scale_bytes: int = 4) -> int | None:
    """Bytes of a quantized weight with its scales, of ``scale_bytes`` each; None where no block divides its inputs."""
    block = block_for(request.block or BLOCKS[request.format], inputs)
    if block is None:
        return None
    codes, scales = outputs * inputs * CODE_BITS[request.format] // 8, outputs * (inputs // block)
    zeros = scales // 2 if request.asymmetric else 0
    return codes + scales * (1 if request.format == "nvfp4" else scale_bytes) + zeros


def quantization_of(quantized: Mapping[str, QuantizedTensor]) -> QuantizeRequest | None:
    """What was asked for where ``quantized``, by the model's own names, are a folder's weights in few bits."""
    if not quantized:
        return None
    form = next(iter(quantized.values())).format
    block = max(tensor.block for tensor in quantized.values()) if form == "int4" else None
    tower = any(name.startswith((TOWER, _PROJECTOR)) for name in quantized)
    zeros = any(tensor.zero is not None for tensor in quantized.values())
    return QuantizeRequest(form, block, LANGUAGE_HEAD in quantized, tower, asymmetric=zeros)


def _reason(name: str, shape: tuple[int, ...], request: QuantizeRequest) -> str | None:
    """Why a weight is left as it is, or None where it is quantized."""
    if name == EMBEDDING_TABLE:
        return "embedding table (rows of it are looked up, nothing is multiplied)"
    if name.startswith((TOWER, _PROJECTOR)) and not request.tower:
        return "of the vision tower and the projector (runs once a picture, and errs for all that follows)"
    if len(shape) != 2 or name.endswith("position_embedding.weight"):
        return "norms, biases and other vectors (few bytes, and every number counts)"
    if name == LANGUAGE_HEAD:
        return None if request.head else "language head (its rounding would reach the logits directly)"
    if name.startswith(LAYERS) and name.rsplit(".", 2)[-2] not in _BLOCK_MATRICES:
        return "unknown to the rules"
    return None
