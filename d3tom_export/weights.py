"""A bundle's weights: a checkpoint's own safetensors files, linked or copied, or the random ones of a geometry.

Graphs read weights in the dtype they are stored in, so nothing is converted but what ONNX graphs should not hold
(float64). Whatever is written is written tensor by tensor: peak memory is one tensor, whatever the model's size.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from d3tom_export.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    StoredTensor,
    empty_model,
    open_checkpoint,
)
from d3tom_export.config import Loop, ModelConfig
from d3tom_export.errors import D3tomError
from d3tom_export.geometry import raw_geometry
from d3tom_export.preflight import Demand, demand
from d3tom_export.progress import Progress, no_progress

WeightsMode = Literal["link", "copy"]
"""How a checkpoint's weight files come into a bundle: as hard links, which take no bytes, or as copies."""

RandomWeights = Literal["random", "sparse"]
"""Weights of a geometry: bfloat16 noise of the usual variance, or zeros in a sparse file that takes no disk."""

SHARD_BYTES = 5 * 10**9
"""The most of one file of random weights: what transformers saves by default."""


def _header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], item_sizes: Mapping[str, int]) -> bytes:
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + item_sizes[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_safetensors(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], data: Iterator[NDArray[Any]] | None
) -> None:
    """Write ``tensors`` (dtype as safetensors spells it, shape) in order; without ``data`` the file is sparse."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2}
    header = _header(tensors, sizes)
    length = len(header) + sum(sizes[dtype] * math.prod(shape) for dtype, shape in tensors.values())
    with path.open("wb") as file:
        file.write(header)
        for array in data or ():
            file.write(np.ascontiguousarray(array).data)
        file.truncate(length)


def _as_stored(tensor: StoredTensor) -> NDArray[Any]:
    """A tensor's bytes mapped from its file; float64 as float32."""
    kinds: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    mapped = np.memmap(tensor.file, kinds[tensor.dtype], "r", tensor.offset, tensor.shape)
    return mapped.astype(np.float32) if tensor.dtype == "F64" else mapped


def used_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The stored tensors that the model uses; the config is held against them first."""
    return {name: checkpoint.tensors[name] for name in empty_model(checkpoint).state_dict()}


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """The checkpoint's weight files."""
    return sorted({tensor.file for tensor in checkpoint.tensors.values()})


def needs_conversion(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether some are stored in a dtype that no graph of ours reads."""
    return any(tensor.dtype == "F64" for tensor in tensors.values())


def bytes_to_write(checkpoint: Checkpoint, mode: WeightsMode) -> int:
    """What :func:`place_weights` will write."""
    used = used_tensors(checkpoint)
    if needs_conversion(used):
        return sum(tensor.length // (2 if tensor.dtype == "F64" else 1) for tensor in used.values())
    return 0 if mode == "link" else sum(path.stat().st_size for path in files_of(checkpoint))


def demand_of(model: Checkpoint | ModelConfig, weights: WeightsMode | RandomWeights, loops: Sequence[Loop]) -> Demand:
    """What building ``model``, a checkpoint or the geometry of one to be made, will need."""
    if isinstance(model, Checkpoint):
        assert weights == "link" or weights == "copy"
        shapes = {name: tensor.shape for name, tensor in used_tensors(model).items()}
        return demand(shapes, model.config.language.n_layers, loops, bytes_to_write(model, weights))
    shapes = _shapes(model)
    size = 2 * sum(map(math.prod, shapes.values()))
    return demand(shapes, model.language.n_layers, loops, size if weights == "random" else 0)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a geometry's tensors by their released names."""
    import torch

    from d3tom_export.model.lavida import Lavida

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Lavida(config).state_dict().items()}


def place_weights(checkpoint: Checkpoint, folder: Path, mode: WeightsMode, progress: Progress = no_progress) -> None:
    """Put the checkpoint's weights into ``folder`` under their own names, with their index where there are shards.

    Where float64 tensors have to become float32, one converted file takes the place of all. Raises
    :class:`D3tomError` where the file system does not link.
    """
    used = used_tensors(checkpoint)
    if needs_conversion(used):
        shapes = {name: ("F32" if t.dtype == "F64" else t.dtype, t.shape) for name, t in used.items()}
        _write_safetensors(folder / SINGLE_FILE, shapes, (_as_stored(tensor) for tensor in used.values()))
        return
    files = files_of(checkpoint)
    for done, path in enumerate(files):
        progress(f"{'linking' if mode == 'link' else 'copying'} {path.name}", done, len(files))
        if mode == "copy":
            shutil.copyfile(path, folder / path.name)
            continue
        try:
            # A hub's cache holds symbolic links, which no runtime follows out of the bundle: link what they lead to.
            os.link(path.resolve(), folder / path.name)
        except OSError as error:
            raise D3tomError(
                f"{path} cannot be linked into {folder.parent} ({error.strerror}): hard links need one file system "
                "that has them. Write the bundle beside the checkpoint, or copy the weights with --weights copy."
            ) from None
    if (checkpoint.folder / INDEX_FILE).exists():
        shutil.copyfile(checkpoint.folder / INDEX_FILE, folder / INDEX_FILE)
    progress("weights in place", len(files), len(files))


def _noise(shapes: Mapping[str, tuple[int, ...]], progress: Progress) -> Iterator[NDArray[np.uint16]]:
    """Normal matrices of variance 1 / inputs, norms of one, biases of zero, as bfloat16 bit patterns, by parts."""
    rng = np.random.default_rng(0)
    for done, (name, shape) in enumerate(shapes.items()):
        progress("writing random weights", done, len(shapes))
        if len(shape) == 1:
            yield np.full(shape, 0 if name.endswith(".bias") else 0x3F80, np.uint16)
            continue
        inputs = math.prod(shape[1:])
        rows = max(1, (1 << 24) // inputs)
        for start in range(0, shape[0], rows):
            part = rng.standard_normal((min(rows, shape[0] - start), inputs), np.float32) * np.float32(inputs**-0.5)
            yield ((part.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def write_geometry(folder: Path, name: str, weights: RandomWeights, progress: Progress = no_progress) -> Checkpoint:
    """Write a checkpoint of geometry ``name`` with ``weights`` in bfloat16 shards into ``folder``, and open it.

    It has no tokenizer: there is nothing to ask it.
    """
    raw = raw_geometry(name)
    (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    shapes = _shapes(ModelConfig.from_json(raw))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for key, shape in shapes.items():
        size += 2 * math.prod(shape)
        if size > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 2 * math.prod(shape)
        shards[-1][key] = shape
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        data = _noise(shard, progress) if weights == "random" else None
        _write_safetensors(folder / file, {key: ("BF16", shape) for key, shape in shard.items()}, data)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": 2 * sum(map(math.prod, shapes.values()))}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    return open_checkpoint(folder)
