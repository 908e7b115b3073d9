"""Where a bundle keeps its stages' graphs in half precision. Imports nothing: running a bundle needs no onnx."""

from __future__ import annotations

from typing import Literal, get_args

HALF_FOLDER = "half"

HalfPrecision = Literal["fp16", "bf16"]
HALF_PRECISIONS: tuple[HalfPrecision, ...] = get_args(HalfPrecision)

HALF_DTYPES: dict[str, str] = {"fp16": "float16", "bf16": "bfloat16"}
"""What the contract's float32 tensors may be in a graph of half precision."""


def half_file(precision: str, stage_key: str) -> str:
    """The name in a bundle of a stage's graph in half precision, whether it has it or not.

    Its external data lie in the bundle's folder, not beside it, as those of the graphs for the CPU do (cpu/place.py).
    """
    return f"{HALF_FOLDER}/{precision}/{stage_key}.onnx"
