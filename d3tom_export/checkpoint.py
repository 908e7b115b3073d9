"""Checkpoint folders in: safetensors by name, memory-mapped; no pickle, no remote code, no network.

A folder holds ``config.json``, one ``model.safetensors`` or shards with ``model.safetensors.index.json``, and, unless
it is a bare language model, ``tokenizer.json``. Headers are read first, so that every missing, truncated, unexpected
or misshapen tensor is known before any weight is.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3tom_export.config import ModelConfig
from d3tom_export.errors import D3tomError, listing
from d3tom_export.trust.documents import read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from d3tom_export.model.lavida import Lavida

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"

UNUSED_MARKS = (".post_layernorm.", ".position_ids", ".inv_freq", ".vision_model.head.")
"""Parts of names of tensors that released checkpoints may store and the features never use (lavida.md A3)."""

_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes per element of the dtypes that checkpoints hold, as safetensors spells them."""

_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")

_VOCABULARY_TENSORS = ("model.transformer.wte.weight", "model.transformer.ff_out.weight")
_TOWER_LAYERS = "model.vision_tower.vision_tower.vision_model.encoder.layers."


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, dtype name as safetensors spells it, shape, and byte range in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read_array(tensor: StoredTensor) -> NDArray[np.float32]:
    """A stored tensor as float32, read without torch; for the few that the host needs."""
    import numpy as np

    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        raw = file.read(tensor.length)
    if tensor.dtype == "BF16":
        array = from_bfloat16(np.frombuffer(raw, "<u2"))
    else:
        array = np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[tensor.dtype]).astype(np.float32)
    return array.reshape(tensor.shape)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Numbers from their bits in bfloat16, which NumPy has no name for: the upper half of a float32's."""
    import numpy as np

    return (bits.astype(np.uint32) << 16).view(np.float32)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name, without reading their data.

    Raises :class:`D3tomError` where the file is missing, is not safetensors, or is shorter than its header promises.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if header_length > size - 8:
                raise D3tomError(f"{path} is truncated or not a safetensors file: its header does not fit into it.")
            header = json.loads(file.read(header_length))
    except FileNotFoundError:
        raise D3tomError(f"{path} does not exist. Fetch the missing file.") from None
    except (OSError, ValueError) as error:
        raise D3tomError(f"{path} cannot be read as safetensors: {error}. Fetch the file again.") from None
    start = 8 + header_length
    tensors = {}
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            shape, item = tuple(entry["shape"]), _ITEM_SIZES.get(entry["dtype"])
            if item is not None and (begin < 0 or end - begin != item * math.prod(shape)):
                raise ValueError(f"{name} of {entry['dtype']} {list(shape)} cannot take {end - begin} bytes")
            tensors[name] = StoredTensor(path, entry["dtype"], shape, start + begin, end - begin)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise D3tomError(
            f"{path} has a safetensors header that makes no sense ({error!r}). Fetch the file again."
        ) from None
    needed = max((tensor.offset + tensor.length for tensor in tensors.values()), default=start)
    if size < needed:
        raise D3tomError(
            f"{path} is truncated: its header describes {needed:,} bytes and the file has {size:,}. "
            "Fetch the file again and compare its size with the source's."
        )
    return tensors


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder. Build one with :func:`open_checkpoint`."""

    folder: Path
    raw_config: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, StoredTensor]

    @cached_property
    def vision_layers(self) -> int:
        """Tower layers stored: as many as the tensor names count."""
        layers = {name[len(_TOWER_LAYERS) :].split(".")[0] for name in self.tensors if name.startswith(_TOWER_LAYERS)}
        return len(layers)

    def read(self, names: list[str], *, clip: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Memory-mapped tensors of ``names`` in stored dtype, file by file.

        ``clip`` cuts embedding table and head to the rows in use.
        """
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for path, members in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in members:
                    tensor = file.get_tensor(name)
                    if clip and name in _VOCABULARY_TENSORS:
                        tensor = tensor[: self.config.language.vocab_rows]
                    yield name, tensor


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder, checked against its index where it has one; every broken shard is named at once."""
    index_path = folder / INDEX_FILE
    if not index_path.exists():
        if (folder / SINGLE_FILE).exists():
            return read_header(folder / SINGLE_FILE)
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f"It holds {listing(pickles)}, which are pickles and are never opened; save the model as safetensors."
            if pickles
            else "Name the folder that holds the weights."
        )
        raise D3tomError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}. {hint}")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise D3tomError(f"{index_path} has no weight_map naming the shard of every tensor. Fetch the file again.")
    shards = sorted({str(shard) for shard in weight_map.values()})
    foreign = [shard for shard in shards if Path(shard).name != shard]
    if foreign:
        raise D3tomError(f"{index_path} names shards outside its folder: {listing(foreign)}. Expected bare file names.")
    headers: dict[str, dict[str, StoredTensor]] = {}
    problems: list[str] = []
    for shard in shards:
        try:
            headers[shard] = read_header(folder / shard)
        except D3tomError as error:
            problems.append(str(error))
    if problems:
        raise D3tomError(" ".join(problems))
    strays = sorted(name for name, shard in weight_map.items() if name not in headers[str(shard)])
    if strays:
        raise D3tomError(
            f"{index_path} promises tensors that its shards do not hold: {listing(strays)}. "
            "Index and shards come from different saves; fetch the folder again."
        )
    # The index decides; what a shard holds beyond it is still reported, as unexpected or unused.
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    tensors |= {name: headers[str(shard)][name] for name, shard in weight_map.items()}
    return tensors


def open_checkpoint(folder: Path, *, clip_vocabulary: bool = True, vocab_rows: int | None = None) -> Checkpoint:
    """Read a checkpoint folder's config and headers; no weight is loaded.

    ``clip_vocabulary`` cuts embedding table and head to the tokenizer's length, as the release does when it loads a
    model; without a tokenizer.json, or when False, every stored row stays in use. ``vocab_rows`` says it outright.
    """
    if not folder.is_dir():
        raise D3tomError(
            f"{folder} is not a folder. --model takes a checkpoint folder with {CONFIG_FILE}, safetensors weights and "
            f"{TOKENIZER_FILE}."
        )
    raw = read_json(folder / CONFIG_FILE)
    if vocab_rows is None and clip_vocabulary and (folder / TOKENIZER_FILE).exists():
        from d3tom_export.prompt import vocabulary_size

        vocab_rows = vocabulary_size(folder / TOKENIZER_FILE)
    config = ModelConfig.from_json(raw, vocab_rows, str(folder / CONFIG_FILE))
    return Checkpoint(folder, raw, config, stored_tensors(folder))


def _is_unused(checkpoint: Checkpoint, name: str) -> bool:
    """Whether released checkpoints may store ``name`` although the features never use it."""
    vision = checkpoint.config.vision
    dropped = f"{_TOWER_LAYERS}{vision.num_hidden_layers - 1}." if vision else "none"
    whole_so400m = checkpoint.raw_config.get("vision_config") is None and name.startswith(dropped)
    return whole_so400m or any(mark in name for mark in UNUSED_MARKS)


def _check_tensors(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]]) -> None:
    language = checkpoint.config.language
    stored_shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    expected = dict(wanted)
    for name in _VOCABULARY_TENSORS:
        expected[name] = (language.embedding_size, language.d_model)
    missing = sorted(expected.keys() - stored_shapes.keys())
    unexpected = sorted(name for name in stored_shapes.keys() - expected.keys() if not _is_unused(checkpoint, name))
    misshapen = [
        f"{name} is {list(stored_shapes[name])}, expected {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in stored_shapes and stored_shapes[name] != shape
    ]
    unreadable = sorted(
        f"{name} ({checkpoint.tensors[name].dtype})"
        for name in expected.keys() & stored_shapes.keys()
        if checkpoint.tensors[name].dtype not in _WEIGHT_DTYPES
    )
    parts = [
        f"{label}: {', '.join(names)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
            ("not F64, F32, F16 or BF16", unreadable),
        )
        if names
    ]
    if parts:
        raise D3tomError(
            f"The weights in {checkpoint.folder} do not fit its {CONFIG_FILE}; {'; '.join(parts)}. "
            "Check that config and weights come from the same model."
        )


def empty_model(checkpoint: Checkpoint) -> Lavida:
    """The checkpoint's model on the meta device, its tensor names and shapes checked against the stored ones."""
    import torch

    from d3tom_export.model.lavida import Lavida

    vision, layers = checkpoint.config.vision, checkpoint.vision_layers
    if vision is not None:
        # The release deletes the last layer of so400m before it loads a checkpoint. A `vision_config` of its own counts
        # either the whole tower, stored without its last layer, or the layers that are stored; both are run as stored.
        counts = [vision.num_hidden_layers - 1]
        if checkpoint.raw_config.get("vision_config") is not None:
            counts.append(vision.num_hidden_layers)
        layers = layers if layers in counts else counts[0]  # else the comparison below names the difference
    with torch.device("meta"):
        model = Lavida(checkpoint.config, layers)
    _check_tensors(checkpoint, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    return model.eval().requires_grad_(False)


def hollow_model(checkpoint: Checkpoint) -> Lavida:
    """The checkpoint's model with parameters of the right shapes and no content, for tracing: 4 bytes each.

    Real CPU tensors of one element, expanded: the exporter asks for shapes and strides and never reads them.
    """
    import torch
    from torch import nn

    model = empty_model(checkpoint)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            hollow = nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False)
            setattr(module, name, hollow)
    _make_buffers(model)
    return model


def load_model(checkpoint: Checkpoint, dtype: str = "float32", *, streamed: bool = False) -> Lavida:
    """The eager model with its weights in ``dtype`` (a torch dtype's name), on the CPU.

    ``streamed`` leaves the weights in their files: every layer maps and converts its own when it runs and lets them go
    after it, so that memory holds one layer's, and a step takes as long as reading the whole model.
    """
    import torch

    from d3tom_export.model.streaming import stream_weights

    model = empty_model(checkpoint)
    target = getattr(torch, dtype)
    if streamed:
        stream_weights(model, checkpoint.read, target)
    else:
        state = {name: tensor.to(target) for name, tensor in checkpoint.read(list(model.state_dict()))}
        model.load_state_dict(state, assign=True)
    _make_buffers(model)
    return model


def _make_buffers(model: nn.Module) -> None:
    """Make what no checkpoint stores (the tower's position ids), which was left on the meta device."""
    import torch

    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
