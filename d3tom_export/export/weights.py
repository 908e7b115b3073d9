"""A bundle's weights: a checkpoint's own safetensors files, linked or copied, or the random ones of a geometry.

Graphs read weights in the dtype they are stored in, so nothing is converted but what ONNX graphs should not hold
(float64), and to float16 where that is asked for. Whatever is written is written in parts: peak memory is that of a
part, whatever the model's size. A vision tower that the checkpoint lacks is written under the checkpoint's own names,
with an index that covers all: the bundle's folder is a checkpoint, which needs no other any more.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3tom_export.bundle.output import work_folder
from d3tom_export.checkpoint.folder import Checkpoint, open_checkpoint
from d3tom_export.checkpoint.geometry import raw_geometry
from d3tom_export.checkpoint.stored import INDEX_FILE, SINGLE_FILE, from_bfloat16
from d3tom_export.checkpoint.tensors import LANGUAGE_HEAD, product_shapes, released_shapes
from d3tom_export.config import CONFIG_FILE, Loop, ModelConfig
from d3tom_export.errors import D3tomError
from d3tom_export.export.preflight import Demand, demand, nearest_folder, quantizing_memory
from d3tom_export.export.request import RandomWeights, WeightsMode
from d3tom_export.families.registry import family_of, read_config
from d3tom_export.progress import Progress, no_progress
from d3tom_export.quantize.plan import QuantizeRequest, plan_of, stored_bytes
from d3tom_export.trust.documents import MOST_BYTES, parse_json
from d3tom_export.trust.files import copy_file, create_file, find_inside, read_bytes, write_file
from d3tom_export.trust.tensors import StoredTensor, check_unchanged, open_stored

SHARD_BYTES = 5 * 10**9
"""The most of one file of random weights: what transformers saves by default."""

TOWER_FILE, MODEL_FILE = "model-vision-tower.safetensors", "model-without-tower.safetensors"
"""In a bundle, a tower from another folder; and the one file of a checkpoint beside it, for ``model.safetensors`` would
be read alone."""

_PART = 1 << 24
"""Elements that are made or converted at a time."""

# NumPy has no name for bfloat16: its bits stand for it.
_NUMPY: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_ITEM_SIZES = {dtype: np.dtype(kind).itemsize for dtype, kind in _NUMPY.items()} | {"U8": 1, "I8": 1, "F8_E4M3": 1}


SafetensorsKind = tuple[str, tuple[int, ...]]
"""A stored tensor's dtype, as safetensors spells it, and its shape."""


def _header(tensors: Mapping[str, SafetensorsKind]) -> bytes:
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + _ITEM_SIZES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(path: Path, tensors: Mapping[str, SafetensorsKind], data: Iterator[NDArray[Any]] | None) -> None:
    """Write ``tensors`` (dtype as safetensors spells it, shape) in order; without ``data`` the file is sparse.

    The file must not be there.
    """
    header = _header(tensors)
    length = len(header) + sum(_ITEM_SIZES[dtype] * math.prod(shape) for dtype, shape in tensors.values())
    with create_file(path) as file:
        file.write(header)
        for array in data or ():
            file.write(np.ascontiguousarray(array).data)
        file.truncate(length)


def parts_as(name: str, tensor: StoredTensor, dtype: str) -> Iterator[NDArray[Any]]:
    """A tensor's numbers as ``dtype``, part by part, mapped from its file. float16 must hold all of them."""
    with open_stored(tensor) as file:
        mapped = np.memmap(file, _NUMPY[tensor.dtype], "r", tensor.offset, (math.prod(tensor.shape),))
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
    """The stored tensors that the model uses."""
    return {name: checkpoint.tensors[name] for name in released_shapes(checkpoint.config, checkpoint.vision_layers)}


def files_of(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The checkpoint's own weight files by their names in a bundle, each with one of its tensors: where it lies."""
    own = [tensor for name, tensor in checkpoint.tensors.items() if name not in checkpoint.lent]
    return {_file_in_bundle(checkpoint, tensor): tensor for tensor in sorted(own, key=lambda tensor: tensor.file)}


def _file_in_bundle(checkpoint: Checkpoint, tensor: StoredTensor) -> str:
    name = tensor.file.name
    return MODEL_FILE if checkpoint.lent and name == SINGLE_FILE else name


def name_in_bundle(checkpoint: Checkpoint, name: str) -> str:
    """The name that a bundle stores tensor ``name`` by: the checkpoint's, also of a tower that it lacks."""
    if name in checkpoint.lent:
        return checkpoint.wrapping + family_of(checkpoint.config).stored_name(name)
    return checkpoint.tensors[name].name


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
    lent = sum(_ITEM_SIZES[dtypes[name]] * math.prod(tensor.shape) for name, tensor in checkpoint.lent.items())
    own = 0 if mode == "link" else sum(tensor.file_bytes for tensor in files_of(checkpoint).values())
    return own + lent


def demand_of(
    model: Checkpoint | ModelConfig,
    weights: WeightsMode | RandomWeights,
    loops: Sequence[Loop],
    engine_item_sizes: Sequence[int] = (),
    *,
    shares_prefix: bool = False,
    quantize: QuantizeRequest | None = None,
) -> Demand:
    """What building ``model``, a checkpoint or the geometry of one to be made, will need.

    ``engine_item_sizes`` and ``shares_prefix`` as for :func:`~d3tom_export.export.preflight.demand`; ``quantize`` are
    weights in few bits, which are written whatever ``weights`` says.
    """
    item_sizes: dict[str, int] = {}
    config = model.config if isinstance(model, Checkpoint) else model
    if isinstance(model, Checkpoint):
        assert weights != "random"
        assert weights != "sparse"
        shapes = dict(released_shapes(model.config, model.vision_layers))
        layers, size = model.config.language.n_layers, 0
        if quantize is not None:
            used = used_tensors(model)
            item_sizes = {name: _ITEM_SIZES[dtype] for name, dtype in dtypes_in_bundle(used, "copy").items()}
        elif not model.quantized:
            size = bytes_to_write(model, weights)
    else:
        shapes, layers = released_shapes(model), model.language.n_layers
        size = 2 * sum(map(math.prod, shapes.values())) if weights == "random" else 0
        item_sizes = dict.fromkeys(shapes, 2)
    quantizing = 0
    if quantize is not None:
        products = shapes | {LANGUAGE_HEAD: product_shapes(config)[LANGUAGE_HEAD]}
        blocks = plan_of(products, quantize).blocks
        for name, shape in shapes.items():
            few = stored_bytes(quantize, *products[name]) if name in blocks else None
            size += few or item_sizes[name] * math.prod(shape)
        quantizing = quantizing_memory(products, blocks, quantize.samples)
    return demand(shapes, layers, loops, size, engine_item_sizes, shares_prefix=shares_prefix, quantizing=quantizing)


def _all_parts(
    tensors: Mapping[str, StoredTensor], dtypes: Mapping[str, str], progress: Progress, what: str
) -> Iterator[NDArray[Any]]:
    for done, (name, tensor) in enumerate(tensors.items()):
        progress(what, done, len(tensors))
        yield from parts_as(name, tensor, dtypes[name])


def _link(tensor: StoredTensor, target: Path) -> None:
    """Link the file of ``tensor`` to ``target``, which must not be there, and look at what was linked."""
    file = tensor.file
    try:
        # A hub's cache holds symbolic links, which no runtime follows out of the bundle: link what they lead to. Should
        # that have become a link meanwhile, the link itself is linked, and refused below.
        os.link(tensor.source, target, follow_symlinks=False)
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
    _check_placed(tensor, target)


def _check_placed(tensor: StoredTensor, target: Path) -> None:
    found = target.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size != tensor.file_bytes:
        raise D3tomError(
            f"{tensor.file} was changed while it was in use: it was a file of {tensor.file_bytes:,} bytes. Run the "
            "command again once nothing writes to it."
        )


def check_linkable(checkpoint: Checkpoint, output: Path) -> None:
    """Refuse a checkpoint whose files cannot be linked to where ``output`` will be, before any work."""
    parent = nearest_folder(output)
    if not os.access(parent, os.W_OK):
        return  # another error's business
    for name, tensor in files_of(checkpoint).items():
        with work_folder(parent, output.name) as trial:
            _link(tensor, trial / name)


def place_weights(checkpoint: Checkpoint, folder: Path, mode: WeightsMode, progress: Progress = no_progress) -> None:
    """Put the checkpoint's weights into ``folder`` under their own names, with their index where there are shards.

    A vision tower from another folder becomes a shard beside them, and the index covers it.

    Every file is created new. Where any weight has to be converted, one file takes the place of all. Raises
    :class:`D3tomError` where the file system does not link, a file changed since its header was read, or float16 does
    not hold a number.
    """
    used = used_tensors(checkpoint)
    dtypes = dtypes_in_bundle(used, mode)
    if _is_converted(used, dtypes):
        shapes = {name_in_bundle(checkpoint, name): (dtypes[name], tensor.shape) for name, tensor in used.items()}
        write_safetensors(folder / SINGLE_FILE, shapes, _all_parts(used, dtypes, progress, "converting weights"))
        progress("weights in place", len(used), len(used))
        return
    files = files_of(checkpoint)
    for done, (name, tensor) in enumerate(files.items()):
        progress(f"{'linking' if mode == 'link' else 'copying'} {name}", done, len(files))
        if mode == "link":
            _link(tensor, folder / name)
        else:
            check_unchanged([tensor])
            copy_file(tensor.source, folder / name)
            _check_placed(tensor, folder / name)
    if checkpoint.lent:
        _write_tower(checkpoint, folder, dtypes, progress)
    elif files.keys() != {SINGLE_FILE}:
        index = read_bytes(find_inside(checkpoint.folder, INDEX_FILE), MOST_BYTES)
        try:
            parse_json(index)
        except ValueError as error:
            raise D3tomError(f"{checkpoint.folder / INDEX_FILE} was changed while it was in use: {error}.") from None
        write_file(folder / INDEX_FILE, index)
    progress("weights in place", len(files), len(files))


def _write_tower(checkpoint: Checkpoint, folder: Path, dtypes: Mapping[str, str], progress: Progress) -> None:
    """Write the tower that the checkpoint lacks as one more shard, and the index of them all."""
    lent = checkpoint.lent
    shapes = {name_in_bundle(checkpoint, name): (dtypes[name], tensor.shape) for name, tensor in lent.items()}
    write_safetensors(folder / TOWER_FILE, shapes, _all_parts(lent, dtypes, progress, "writing the vision tower"))
    own = {
        tensor.name: _file_in_bundle(checkpoint, tensor)
        for name, tensor in checkpoint.tensors.items()
        if name not in lent
    }
    total = sum(tensor.length for tensor in checkpoint.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": own | dict.fromkeys(shapes, TOWER_FILE)}
    write_file(folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())


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
    write_file(folder / CONFIG_FILE, (json.dumps(raw, indent=2) + "\n").encode())
    config = read_config(raw)
    stored_name = family_of(config).stored_name
    shapes = {stored_name(key): shape for key, shape in released_shapes(config).items()}
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
        write_safetensors(folder / file, {key: ("BF16", shape) for key, shape in shard.items()}, data)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": 2 * sum(map(math.prod, shapes.values()))}, "weight_map": weight_map}
        write_file(folder / INDEX_FILE, json.dumps(index).encode())
    return open_checkpoint(folder)
