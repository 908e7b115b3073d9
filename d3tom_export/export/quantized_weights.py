"""A bundle's weights in few bits, quantized tensor by tensor on their way from the checkpoint's files to its own.

Memory holds one weight at a time, in float32, and what choosing its scales takes beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from d3tom_export.checkpoint.folder import Checkpoint
from d3tom_export.checkpoint.quantized import part_name
from d3tom_export.checkpoint.stored import SINGLE_FILE
from d3tom_export.checkpoint.tensors import LANGUAGE_HEAD
from d3tom_export.export.weights import (
    dtypes_in_bundle,
    name_in_bundle,
    parts_as,
    used_tensors,
    write_safetensors,
)
from d3tom_export.progress import Progress, no_progress
from d3tom_export.quantize.matrices import FORMATS, Format, round_to_nearest
from d3tom_export.quantize.plan import QuantizePlan
from d3tom_export.quantize.stored import to_parts


def place_quantized(checkpoint: Checkpoint, folder: Path, plan: QuantizePlan, progress: Progress = no_progress) -> None:
    """Write the checkpoint's weights into ``folder``, those of ``plan`` quantized and the others as they are stored.

    One file takes the place of all shards. Raises :class:`D3tomError` where a file changed since its header was read.
    """
    used, form = used_tensors(checkpoint), FORMATS[plan.format]
    dtypes = dtypes_in_bundle(used, "copy")
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in used.items():
        stored = name_in_bundle(checkpoint, name)
        if name in plan.blocks:
            shape = (_rows(checkpoint, name), tensor.shape[1])
            for part, kind in _part_kinds(shape, form, plan.blocks[name]).items():
                shapes[part_name(stored, form.name, part)] = kind
        else:
            shapes[stored] = dtypes[name], tensor.shape

    def data() -> Iterator[NDArray[Any]]:
        for done, (name, tensor) in enumerate(used.items()):
            progress(f"quantizing to {form.name}" if name in plan.blocks else "copying weights", done, len(used))
            if name in plan.blocks:
                parts = _quantized(checkpoint, name, form, plan.blocks[name])
                yield from (part.reshape(-1).view(torch.uint8).numpy() for part in parts.values())
            else:
                yield from parts_as(name, tensor, dtypes[name])

    write_safetensors(folder / SINGLE_FILE, shapes, data())
    progress("weights in place", len(used), len(used))


def _rows(checkpoint: Checkpoint, name: str) -> int:
    """Outputs of a weight that is quantized: of the head those in use, for a graph can take no part of the codes."""
    return checkpoint.config.language.head_rows if name == LANGUAGE_HEAD else checkpoint.tensors[name].shape[0]


def _quantized(checkpoint: Checkpoint, name: str, form: Format, block: int) -> dict[str, Tensor]:
    ((_, weight),) = checkpoint.read([name])
    return to_parts(round_to_nearest(weight.float(), form, block), form)


def _part_kinds(shape: tuple[int, int], form: Format, block: int) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of the parts that a weight of ``shape`` will have."""
    outputs, inputs = shape
    codes = (inputs, outputs) if form.grid.bits == 8 else (math.prod(shape) // 2,)
    kind = {"int8": "I8", "fp8": "F8_E4M3"}.get(form.name, "U8")
    scales = (inputs // block, outputs) if form.block is not None else (outputs,)
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {"": (kind, codes)}
    kinds["_scale"] = ("F32" if form.scale_grid is None else "F8_E4M3", scales)
    return kinds if form.scale_grid is None else kinds | {"_whole": ("F32", ())}
