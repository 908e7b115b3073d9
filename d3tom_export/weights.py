"""A bundle's weights: a checkpoint's own safetensors files, linked or copied, or the random ones of a geometry.

Graphs read weights in the dtype they are stored in, so nothing is converted but what ONNX graphs should not hold
(float64), and to float16 where that is asked for. Whatever is written is written in parts: peak memory is that of a
part, whatever the model's size.
"""

from __future__ import annotations

import errno
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
    from_bfloat16,
    open_checkpoint,
)
from d3tom_export.config import Loop, ModelConfig
from d3tom_export.errors import D3tomError
from d3tom_export.geometry import raw_geometry
from d3tom_export.output import work_folder
from d3tom_export.preflight import Demand, demand, nearest_folder
from d3tom_export.progress import Progress, no_progress

WeightsMode = Literal["link", "copy", "float16"]
"""How a checkpoint's weight files come into a bundle: as hard links, which take no bytes, as copies, or converted to
float16, for GPUs without bfloat16."""

RandomWeights = Literal["random", "sparse"]
"""Weights of a geometry: bfloat16 noise of the usual variance, or zeros in a sparse file that takes no disk."""

SHARD_BYTES = 5 * 10**9
"""The most of one file of random weights: what transformers saves by default."""

_PART = 1 << 24
"""Elements that are made or converted at a time."""

# NumPy has no name for bfloat16: its bits stand for it.
_NUMPY: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_ITEM_SIZES = {dtype: np.dtype(kind).itemsize for dtype, kind in _NUMPY.items()}


def _header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + _ITEM_SIZES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_safetensors(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], data: Iterator[NDArray[Any]] | None
) -> None:
    """Write ``tensors`` (dtype as safetensors spells it, shape) in order; without ``data`` the file is sparse."""
    header = _header(tensors)
    length = len(header) + sum(_ITEM_SIZES[dtype] * math.prod(shape) for dtype, shape in tensors.values())
    with path.open("wb") as file:
        file.write(header)
        for array in data or ():
            file.write(np.ascontiguousarray(array).data)
        file.truncate(length)


def _parts_as(name: str, tensor: StoredTensor, dtype: str) -> Iterator[NDArray[Any]]:
    """A tensor's numbers as ``dtype``, part by part, mapped from its file. float16 must hold all of them."""
    mapped = np.memmap(tensor.file, _NUMPY[tensor.dtype], "r", tensor.offset, (math.prod(tensor.shape),))
    for start in range(0, len(mapped), _PART):
        part = mapped[start : start + _PART]
        if tensor.dtype == dtype:
            yield part
            continue
        numbers = from_bfloat16(part) if tensor.dtype == "BF16" else part
        with np.errstate(over="ignore"):
            converted = numbers.astype(_NUMPY[dtype])
        if not np.isfinite(converted).all():
            raise D3tomError(
                f"{name} holds numbers that {np.dtype(_NUMPY[dtype]).name} does not (largest size "
                f"{np.abs(numbers).max():.4g}). Keep the weights as they are stored, with --weights link or copy."
            )
        yield converted


def used_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The stored tensors that the model uses; the config is held against them first."""
    return {name: checkpoint.tensors[name] for name in empty_model(checkpoint).state_dict()}


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """The checkpoint's weight files."""
    return sorted({tensor.file for tensor in checkpoint.tensors.values()})


def dtypes_in_bundle(tensors: Mapping[str, StoredTensor], mode: WeightsMode) -> dict[str, str]:
    """The dtype that each of ``tensors`` has in a bundle, as safetensors spells it: no graph of ours reads float64."""
    if mode == "float16":
        return dict.fromkeys(tensors, "F16")
    return {name: "F32" if tensor.dtype == "F64" else tensor.dtype for name, tensor in tensors.items()}


def _is_converted(tensors: Mapping[str, StoredTensor], dtypes: Mapping[str, str]) -> bool:
    return any(tensor.dtype != dtypes[name] for name, tensor in tensors.items())


def bytes_to_write(checkpoint: Checkpoint, mode: WeightsMode) -> int:
    """What :func:`place_weights` will write."""
    used = used_tensors(checkpoint)
    dtypes = dtypes_in_bundle(used, mode)
    if _is_converted(used, dtypes):
        return sum(_ITEM_SIZES[dtypes[name]] * math.prod(tensor.shape) for name, tensor in used.items())
    return 0 if mode == "link" else sum(path.stat().st_size for path in files_of(checkpoint))


def demand_of(
    model: Checkpoint | ModelConfig,
    weights: WeightsMode | RandomWeights,
    loops: Sequence[Loop],
    engine_item_sizes: Sequence[int] = (),
) -> Demand:
    """What building ``model``, a checkpoint or the geometry of one to be made, will need.

    ``engine_item_sizes`` as for :func:`~d3tom_export.preflight.demand`.
    """
    if isinstance(model, Checkpoint):
        assert weights != "random"
        assert weights != "sparse"
        shapes = {name: tensor.shape for name, tensor in used_tensors(model).items()}
        return demand(shapes, model.config.language.n_layers, loops, bytes_to_write(model, weights), engine_item_sizes)
    shapes = _shapes(model)
    size = 2 * sum(map(math.prod, shapes.values()))
    return demand(shapes, model.language.n_layers, loops, size if weights == "random" else 0, engine_item_sizes)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a geometry's tensors by their released names."""
    import torch

    from d3tom_export.model.lavida import Lavida

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Lavida(config).state_dict().items()}


def _all_parts(
    tensors: Mapping[str, StoredTensor], dtypes: Mapping[str, str], progress: Progress
) -> Iterator[NDArray[Any]]:
    for done, (name, tensor) in enumerate(tensors.items()):
        progress("converting weights", done, len(tensors))
        yield from _parts_as(name, tensor, dtypes[name])


def _link(file: Path, target: Path) -> None:
    try:
        # A hub's cache holds symbolic links, which no runtime follows out of the bundle: link what they lead to.
        os.link(file.resolve(), target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            remedy = "Write the bundle to the checkpoint's file system, or copy the weights with --weights copy."
        elif error.errno in (errno.EPERM, errno.EACCES):
            remedy = (
                "The system links only files that you own or may write, on file systems that have hard links. Copy the "
                "weights with --weights copy."
            )
        else:
            remedy = "Copy the weights with --weights copy."
        raise D3tomError(f"{file} cannot be linked into {target.parent.parent} ({error.strerror}). {remedy}") from None


def check_linkable(checkpoint: Checkpoint, output: Path) -> None:
    """Refuse a checkpoint whose files cannot be linked to where ``output`` will be, before any work."""
    parent = nearest_folder(output)
    if not os.access(parent, os.W_OK):
        return  # another error's business
    for file in files_of(checkpoint):
        with work_folder(parent, output.name) as trial:
            _link(file, trial / file.name)


def place_weights(checkpoint: Checkpoint, folder: Path, mode: WeightsMode, progress: Progress = no_progress) -> None:
    """Put the checkpoint's weights into ``folder`` under their own names, with their index where there are shards.

    Where any has to be converted, one file takes the place of all. Raises :class:`D3tomError` where the file system
    does not link, or float16 does not hold a number.
    """
    used = used_tensors(checkpoint)
    dtypes = dtypes_in_bundle(used, mode)
    if _is_converted(used, dtypes):
        shapes = {name: (dtypes[name], tensor.shape) for name, tensor in used.items()}
        _write_safetensors(folder / SINGLE_FILE, shapes, _all_parts(used, dtypes, progress))
        progress("weights in place", len(used), len(used))
        return
    files = files_of(checkpoint)
    for done, path in enumerate(files):
        progress(f"{'linking' if mode == 'link' else 'copying'} {path.name}", done, len(files))
        if mode != "link":
            shutil.copyfile(path, folder / path.name)
            continue
        _link(path, folder / path.name)
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
        rows = max(1, _PART // inputs)
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
