"""Checkpoint folders in: safetensors by name, memory-mapped; no pickle, no remote code, no network.

A folder holds ``config.json``, one ``model.safetensors`` or shards with ``model.safetensors.index.json``, and, unless
it is a bare language model, ``tokenizer.json``. Headers are read first, so that every missing, truncated, unexpected
or misshapen tensor is known before any weight is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3tom_export.config import CONFIG_FILE, POSITIONS, GenerationConfig, ModelConfig, remasking_mode
from d3tom_export.errors import D3tomError, listing
from d3tom_export.released_tensors import EMBEDDING_TABLE, LANGUAGE_HEAD, TOWER_LAYERS, released_shapes
from d3tom_export.trust.documents import read_json
from d3tom_export.trust.fields import shown
from d3tom_export.trust.files import check_name, find_inside, is_there
from d3tom_export.trust.tensors import StoredTensor, check_unchanged, open_stored, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from d3tom_export.model.lavida import Lavida

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
_GENERATION_FILE = "generation_config.json"

UNUSED_MARKS = (".post_layernorm.", ".position_ids", ".inv_freq", ".vision_model.head.")
"""Parts of names of tensors that released checkpoints may store and the features never use (lavida.md A3)."""

_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")

_VOCABULARY_TENSORS = (EMBEDDING_TABLE, LANGUAGE_HEAD)

_MOST_SHARDS = 1000
"""Of a checkpoint. The largest published have 200."""

_MOST_TENSORS = 400_000
"""Of a checkpoint. The largest published, with hundreds of experts a layer, have 100,000."""

_MOST_NAMED = 20
"""Tensors that a message names of each kind of difference: a layer has up to sixteen."""

_LARGEST_ARRAY = 1 << 30
"""Bytes of a tensor that the host reads whole: vectors of the model's width, a few kB each."""


def read_array(tensor: StoredTensor) -> NDArray[np.float32]:
    """A stored tensor as float32, read without torch; for the few that the host needs.

    Raises :class:`D3tomError` where it is not one of floats, is huge, or its file changed since its header was read.
    """
    import numpy as np

    if tensor.dtype not in _WEIGHT_DTYPES or tensor.length > _LARGEST_ARRAY:
        raise D3tomError(
            f"{tensor.file} holds a tensor of {tensor.length:,} bytes of {tensor.dtype} where a vector of F64, F32, "
            "F16 or BF16 is expected. Fetch the file again."
        )
    with open_stored(tensor) as file:
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


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder. Build one with :func:`open_checkpoint`."""

    folder: Path
    raw_config: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, StoredTensor]

    @cached_property
    def vision_layers(self) -> int:
        """Layers of the vision tower that are run: as many as the tensor names count, where the config agrees."""
        vision = self.config.vision
        if vision is None:
            return 0
        # The release deletes the last layer of so400m before it loads a checkpoint. A `vision_config` of its own counts
        # either the whole tower, stored without its last layer, or the layers that are stored; both are run as stored.
        counts = [vision.num_hidden_layers - 1]
        if self.raw_config.get("vision_config") is not None:
            counts.append(vision.num_hidden_layers)
        stored = {name[len(TOWER_LAYERS) :].split(".")[0] for name in self.tensors if name.startswith(TOWER_LAYERS)}
        return len(stored) if len(stored) in counts else counts[0]  # else the tensors' check names the difference

    def read(self, names: list[str], *, clip: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Memory-mapped tensors of ``names`` in stored dtype, file by file.

        ``clip`` cuts embedding table and head to the rows in use.
        """
        from safetensors import safe_open

        rows = {EMBEDDING_TABLE: self.config.language.vocab_rows, LANGUAGE_HEAD: self.config.language.head_rows}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].source, []).append(name)
        check_unchanged(self.tensors[name] for name in names)
        for path, members in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in members:
                    tensor = file.get_tensor(name)
                    if clip and name in rows:
                        tensor = tensor[: rows[name]]
                    yield name, tensor


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder, checked against its index where it has one; every broken shard is named at once.

    As in transformers, one ``model.safetensors`` is taken before any index. Raises :class:`D3tomError` where an index
    whose shards are all there lies beside it: which of the two saves is meant, nobody can tell.
    """
    single, indexed = is_there(folder, SINGLE_FILE), is_there(folder, INDEX_FILE)
    if single:
        shards = set(_weight_map(folder).values()) if indexed else set()
        if shards - {SINGLE_FILE} and all(is_there(folder, shard) for shard in shards):
            raise D3tomError(
                f"{folder} holds two saves of a model: {SINGLE_FILE}, and {INDEX_FILE} with its shards "
                f"({listing(sorted(shards), 4)}). Remove the older one."
            )
        return read_header(folder / SINGLE_FILE, find_inside(folder, SINGLE_FILE))
    if not indexed:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f"It holds {listing(pickles)}, which are pickles and are never opened; save the model as safetensors."
            if pickles
            else "Name the folder that holds the weights."
        )
        raise D3tomError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}. {hint}")
    weight_map = _weight_map(folder)
    headers: dict[str, dict[str, StoredTensor]] = {}
    problems: list[str] = []
    for shard in sorted(set(weight_map.values())):
        try:
            headers[shard] = read_header(folder / shard, find_inside(folder, shard))
        except D3tomError as error:
            problems.append(str(error))
        if sum(map(len, headers.values())) > _MOST_TENSORS:
            raise D3tomError(f"{folder} holds more than {_MOST_TENSORS:,} tensors, which no model has.")
    if problems:
        raise D3tomError(" ".join(problems[:8]) + (f" And {len(problems) - 8} more." if len(problems) > 8 else ""))
    strays = sorted(name for name, shard in weight_map.items() if name not in headers[shard])
    if strays:
        raise D3tomError(
            f"{folder / INDEX_FILE} promises tensors that its shards do not hold: {listing(strays)}. "
            "Index and shards come from different saves; fetch the folder again."
        )
    # The index decides; what a shard holds beyond it is still reported, as unexpected or unused.
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    tensors |= {name: headers[shard][name] for name, shard in weight_map.items()}
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    """The shard of every tensor, as the folder's index has it: names of safetensors files beside the index.

    A bundle gets the shards under these names, beside files of its own, none of which ends in ``.safetensors`` but the
    one that a conversion writes in place of all shards.
    """
    path = folder / INDEX_FILE
    weight_map = read_json(find_inside(folder, INDEX_FILE)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise D3tomError(f"{path} has no weight_map naming the shard of every tensor. Fetch the file again.")
    odd = {shown(shard): None for shard in weight_map.values() if not isinstance(shard, str)}
    if odd:
        raise D3tomError(f"{path} names shards that are no names of files: {listing(odd)}. Fetch the file again.")
    shards = sorted(set(weight_map.values()))
    if len(shards) > _MOST_SHARDS:
        raise D3tomError(f"{path} names {len(shards):,} shards, at most {_MOST_SHARDS:,} are read. Fetch it again.")
    foreign = [shard for shard in shards if "/" in shard or "\\" in shard or shard in (".", "..")]
    if foreign:
        raise D3tomError(f"{path} names shards outside its folder: {listing(foreign)}. Expected bare file names.")
    spellings: dict[str, str] = {}
    for shard in shards:
        try:
            check_name(shard, suffix=".safetensors")
        except D3tomError as error:
            raise D3tomError(
                f"{path} names a shard that is none: {error} Rename the file and the index's entries."
            ) from None
        # File systems that fold case or compose letters would let one shard take another's place.
        other = spellings.setdefault(unicodedata.normalize("NFKC", shard).casefold(), shard)
        if other != shard:
            raise D3tomError(
                f"{path} names the shards {other!r} and {shard!r}, which some file systems take for the same file. "
                "Rename one of them, in the index too."
            )
    return weight_map


def open_checkpoint(folder: Path, *, clip_vocabulary: bool = True, vocab_rows: int | None = None) -> Checkpoint:
    """Read a checkpoint folder's config and headers, and hold one against the other; no weight is loaded.

    ``clip_vocabulary`` cuts the embedding table to the tokenizer's length, and the head where config.json says
    ``tie_word_embeddings`` false, as the release does when it loads a model; without a tokenizer.json, or when False,
    every stored row stays in use. ``vocab_rows`` says the length outright.
    Raises :class:`D3tomError` where a file is missing or is none that can be read, or config and weights disagree.
    """
    if not folder.is_dir():
        raise D3tomError(
            f"{folder} is not a folder. --model takes a checkpoint folder with {CONFIG_FILE}, safetensors weights and "
            f"{TOKENIZER_FILE}."
        )
    raw = read_json(find_inside(folder, CONFIG_FILE))
    if vocab_rows is None and clip_vocabulary and is_there(folder, TOKENIZER_FILE):
        tokenizer = find_inside(folder, TOKENIZER_FILE)
        from d3tom_export.prompt import vocabulary_size

        vocab_rows = vocabulary_size(tokenizer)
    config = ModelConfig.from_json(raw, vocab_rows, str(folder / CONFIG_FILE))
    checkpoint = Checkpoint(folder, raw, config, stored_tensors(folder))
    _check_tensors(checkpoint)
    return checkpoint


def _is_unused(checkpoint: Checkpoint, name: str) -> bool:
    """Whether released checkpoints may store ``name`` although the features never use it."""
    vision = checkpoint.config.vision
    dropped = f"{TOWER_LAYERS}{vision.num_hidden_layers - 1}." if vision else "none"
    whole_so400m = checkpoint.raw_config.get("vision_config") is None and name.startswith(dropped)
    return whole_so400m or any(mark in name for mark in UNUSED_MARKS)


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Hold the stored tensors against the config, before any module is made of it."""
    expected = released_shapes(checkpoint.config, checkpoint.vision_layers)
    stored_shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    missing = sorted(expected.keys() - stored_shapes.keys())
    unexpected = sorted(name for name in stored_shapes.keys() - expected.keys() if not _is_unused(checkpoint, name))
    misshapen = [
        f"{name} is {_axes(stored_shapes[name])}, expected {_axes(shape)}"
        for name, shape in sorted(expected.items())
        if name in stored_shapes and stored_shapes[name] != shape
    ]
    unreadable = sorted(
        f"{name} ({checkpoint.tensors[name].dtype})"
        for name in expected.keys() & stored_shapes.keys()
        if checkpoint.tensors[name].dtype not in _WEIGHT_DTYPES
    )
    parts = [
        f"{label}: {listing(names, _MOST_NAMED)}"
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


def _axes(shape: Iterable[int]) -> str:
    return f"[{listing(shape, 8)}]"


def empty_model(checkpoint: Checkpoint) -> Lavida:
    """The checkpoint's model on the meta device; tensors and config were held against each other when it was opened."""
    import torch

    from d3tom_export.model.lavida import Lavida

    with torch.device("meta"):
        model = Lavida(checkpoint.config, checkpoint.vision_layers)
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


def default_generation(folder: Path | None = None) -> GenerationConfig:
    """How a model answers unless told otherwise: LaViDa's own script, changed by its ``generation_config.json``.

    LaViDa's predict.py asks for 64 tokens in 32 steps under the "shift" schedule (lavida.md D1); we decode greedily.
    ``folder`` is the checkpoint's; None: the script's settings as they are.
    """
    raw, limit = {}, None
    if folder is not None and is_there(folder, _GENERATION_FILE):
        raw = read_json(find_inside(folder, _GENERATION_FILE))
        limit = read_json(find_inside(folder, CONFIG_FILE)).get("max_sequence_length")
    try:
        generation = GenerationConfig(
            gen_length=64 if raw.get("max_new_tokens") is None else raw["max_new_tokens"],
            block_length=raw.get("block_length"),
            step_ratio=raw.get("step_ratio", 0.5),
            schedule=raw.get("schedule", "shift"),
            shift=raw.get("shift", 3.0),
            remasking=remasking_mode(raw.get("remasking", "low_confidence")),
        )
        longest = limit if type(limit) is int else POSITIONS
        if "max_new_tokens" in raw and generation.gen_length >= longest:
            raise D3tomError(f"max_new_tokens is {generation.gen_length:,}, and the model has {longest:,} positions.")
    except D3tomError as error:
        if not raw:
            raise
        assert folder is not None
        raise D3tomError(f"{folder / _GENERATION_FILE} cannot be followed. {error} Correct the file.") from None
    return generation
