"""Checkpoint folders in: a config and the tensors that it promises, held against one another before any weight is read.

A folder holds ``config.json``, one ``model.safetensors`` or shards with ``model.safetensors.index.json``, and, unless
it is a bare language model, ``tokenizer.json``. What it is comes first, then its config's fields, then its tensors:
headers are read, so that every missing, truncated, unexpected or misshapen one is known before any weight is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3tom_export.checkpoint.foreign import check_folder, check_names, check_weights
from d3tom_export.checkpoint.quantized import QuantizedTensor, with_quantized
from d3tom_export.checkpoint.stored import WEIGHT_DTYPES, stored_tensors
from d3tom_export.checkpoint.tensors import (
    EMBEDDING_TABLE,
    LANGUAGE_HEAD,
    TOWER,
    TOWER_LAYERS,
    named_tensors,
    product_shapes,
    released_shapes,
)
from d3tom_export.checkpoint.tower import read_tower
from d3tom_export.checkpoint.wrappers import wrapping
from d3tom_export.config import CONFIG_FILE, TOKENIZER_FILE, GenerationConfig, ModelConfig, remasking_mode
from d3tom_export.errors import D3tomError, listing
from d3tom_export.families.registry import FAMILIES, family_of, read_config, recognise
from d3tom_export.quantize.plan import impossible_quantized
from d3tom_export.trust.documents import read_json
from d3tom_export.trust.fields import shown
from d3tom_export.trust.files import find_inside, is_there
from d3tom_export.trust.tensors import StoredTensor, check_unchanged

if TYPE_CHECKING:
    from torch import Tensor

_GENERATION_FILE = "generation_config.json"
_GENERATION_KEYS = {
    "max_new_tokens": "gen_length",
    "block_length": "block_length",
    "step_ratio": "step_ratio",
    "schedule": "schedule",
    "shift": "shift",
    "remasking": "remasking",
}
"""What of a ``generation_config.json`` is followed, by its key, as our field. The rest is for sampling from
autoregressive models, or ours by the command line."""
UNUSED_MARKS = (".post_layernorm.", ".position_ids", ".inv_freq", ".vision_model.head.")
"""Parts of names of tensors that released checkpoints may store and the features never use (lavida.md A3)."""


_TOWER_FIELD = "model.vision_tower."
_OTHER_EYES = ("model.mm_projector.", "model.image_newline")
"""Beginnings of names of what a model with eyes has beside its tower."""

_MOST_NAMED = 20
"""Tensors that a message names of each kind of difference: a layer has up to sixteen."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder. Build one with :func:`open_checkpoint`."""

    folder: Path
    raw_config: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    """By the model's own names."""
    wrapping: str = ""
    """What wrappers put before every stored name, and is left out."""
    tower_folder: Path | None = None
    """Where the vision tower was taken from, if it is not the checkpoint's own."""
    quantized: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    """Weights of a bundle's that are stored in few bits, by the model's own names; they are not in :attr:`tensors`."""

    @cached_property
    def lent(self) -> dict[str, StoredTensor]:
        """The tensors that are not the folder's own, but of :attr:`tower_folder`."""
        foreign = self.tower_folder is not None
        return {name: tensor for name, tensor in self.tensors.items() if foreign and name.startswith(TOWER)}

    @property
    def notes(self) -> list[str]:
        """What there is to tell of how the folder was read."""
        told = []
        if self.wrapping:
            told.append(f"Note: every tensor's name begins with {self.wrapping}, which is left out.")
        if self.tower_folder is not None:
            told.append(f"Note: the vision tower is that of {self.tower_folder}; {self.folder} has none.")
        return told

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
        """Memory-mapped tensors of ``names`` in stored dtype, file by file; quantized ones as float32.

        ``clip`` cuts embedding table and head to the rows in use.
        """
        from safetensors import safe_open

        rows = {EMBEDDING_TABLE: self.config.language.vocab_rows, LANGUAGE_HEAD: self.config.language.head_rows}
        plain = [name for name in names if name not in self.quantized]
        quantized = [self.quantized[name] for name in names if name in self.quantized]
        by_file: dict[Path, list[str]] = {}
        for name in plain:
            by_file.setdefault(self.tensors[name].source, []).append(name)
        check_unchanged([*(self.tensors[name] for name in plain), *(part for each in quantized for part in each.parts)])
        for path, members in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in members:
                    tensor = file.get_tensor(self.tensors[name].name)
                    if clip and name in rows:
                        tensor = tensor[: rows[name]]
                    yield name, tensor
        if quantized:
            from d3tom_export.quantize.stored import read_quantized

            for name in names:
                if name in self.quantized:
                    yield name, read_quantized(self.quantized[name])


def open_checkpoint(
    folder: Path,
    *,
    clip_vocabulary: bool = True,
    vocab_rows: int | None = None,
    family: str | None = None,
    changed: Mapping[str, Any] | None = None,
    vision_tower: Path | None = None,
) -> Checkpoint:
    """Read a checkpoint folder's config and headers, and hold one against the other; no weight is loaded.

    ``clip_vocabulary`` cuts the embedding table to the tokenizer's length, and the head where config.json says
    ``tie_word_embeddings`` false, as the release does when it loads a model; without a tokenizer, or when False, every
    stored row stays in use. ``vocab_rows`` says the length outright, ``family`` which family's model it is (None:
    it is recognised), and ``changed`` has keys that take the place of the ``config.json``'s. ``vision_tower`` is a
    folder with the tower of a checkpoint that was saved without its own (:mod:`d3tom_export.checkpoint.tower`).
    Raises :class:`D3tomError` where the folder is something else than a checkpoint of a family's, a file is missing or
    is none that can be read, or config and weights disagree.
    """
    if not folder.is_dir():
        raise D3tomError(
            f"{folder} is not a folder. --model takes a checkpoint folder with {CONFIG_FILE}, safetensors weights and "
            f"{TOKENIZER_FILE}."
        )
    check_folder(folder)
    raw = read_json(find_inside(folder, CONFIG_FILE)) | dict(changed or {})
    source = str(folder / CONFIG_FILE)
    known = recognise(raw, source) if family is None else FAMILIES[family]
    check_weights(folder)
    stored = stored_tensors(folder)
    check_names(folder, stored)
    if vocab_rows is None and clip_vocabulary:
        from d3tom_export.prompt.vocabulary import has_tokenizer, vocabulary_size

        vocab_rows = vocabulary_size(folder, known) if has_tokenizer(folder, known) else None
    config = read_config(raw, vocab_rows, source, known.name)
    _check_family(folder, config, stored)
    named = named_tensors(with_quantized(stored, folder), config)
    quantized = {name: tensor for name, tensor in named.items() if isinstance(tensor, QuantizedTensor)}
    tensors = {name: tensor for name, tensor in named.items() if isinstance(tensor, StoredTensor)}
    tensors = _with_tower(folder, raw, config, tensors, vision_tower)
    checkpoint = Checkpoint(folder, raw, config, tensors, wrapping(stored), vision_tower, quantized)
    _check_tensors(checkpoint)
    return checkpoint


def _check_family(folder: Path, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse weights whose names are another family's than the config's."""
    prefix, family = wrapping(stored), family_of(config)
    if prefix + family.stored_name(EMBEDDING_TABLE) in stored:
        return
    others = [each for each in FAMILIES.values() if prefix + each.stored_name(EMBEDDING_TABLE) in stored]
    if others:
        raise D3tomError(
            f"{folder} holds two models' files: its {CONFIG_FILE} is {family.title}'s, whose embedding table is called "
            f"{family.stored_name(EMBEDDING_TABLE)}, and its weights have {prefix}"
            f"{others[0].stored_name(EMBEDDING_TABLE)}, as {' and '.join(each.title for each in others)} have. Fetch "
            "both from the same model."
        )


def _with_tower(
    folder: Path, raw: dict[str, Any], config: ModelConfig, tensors: dict[str, StoredTensor], given: Path | None
) -> dict[str, StoredTensor]:
    """``tensors`` and those of the vision tower that was ``given``, where the checkpoint needs one and has none."""
    has_own = any(name.startswith(_TOWER_FIELD) for name in tensors)
    if given is not None and (config.vision is None or has_own):
        why = "has a vision tower of its own" if has_own else "has no eyes: its config names no vision tower"
        raise D3tomError(f"--vision-tower {given} does not go with {folder}, which {why}. Leave the option out.")
    eyes = [tensor.name for name, tensor in tensors.items() if name.startswith((_TOWER_FIELD, *_OTHER_EYES))]
    if config.vision is None and eyes:
        raise D3tomError(
            f"{folder} holds weights of a model with eyes ({listing(eyes, 2)}), and its {CONFIG_FILE} names no vision "
            "tower (mm_vision_tower), which to the original is a model without. Fetch the config.json that was saved "
            "with the weights."
        )
    if config.vision is None or has_own:
        return tensors
    if given is None:
        name = raw.get("mm_vision_tower")
        named = f" (mm_vision_tower {shown(name)})" if name is not None else ""
        raise D3tomError(
            f"{folder} was saved without its vision tower: its {CONFIG_FILE} says that the model has one{named}, and "
            f"no tensor of {_TOWER_FIELD} is stored. Fetch the tower, and give its folder with "
            "--vision-tower DIR; the model must have been trained with that tower as it was published."
        )
    return tensors | read_tower(given, config.vision)


def _is_unused(checkpoint: Checkpoint, name: str) -> bool:
    """Whether released checkpoints may store ``name`` although the features never use it."""
    vision = checkpoint.config.vision
    dropped = f"{TOWER_LAYERS}{vision.num_hidden_layers - 1}." if vision else "none"
    whole_so400m = checkpoint.raw_config.get("vision_config") is None and name.startswith(dropped)
    return whole_so400m or any(mark in name for mark in UNUSED_MARKS)


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Hold the stored tensors against the config, before any module is made of it."""
    shapes_of = product_shapes if LANGUAGE_HEAD in checkpoint.quantized else released_shapes
    expected = shapes_of(checkpoint.config, checkpoint.vision_layers)
    everything: dict[str, StoredTensor | QuantizedTensor] = {**checkpoint.tensors, **checkpoint.quantized}
    stored_shapes = {name: tensor.shape for name, tensor in everything.items()}
    stored_name = family_of(checkpoint.config).stored_name
    missing = sorted(map(stored_name, expected.keys() - stored_shapes.keys()))
    unexpected = sorted(
        everything[name].name for name in stored_shapes.keys() - expected.keys() if not _is_unused(checkpoint, name)
    )
    misshapen = [
        f"{everything[name].name} is {_axes(stored_shapes[name])}, expected {_axes(shape)}"
        for name, shape in sorted(expected.items())
        if name in stored_shapes and stored_shapes[name] != shape
    ]
    unreadable = sorted(
        f"{checkpoint.tensors[name].name} ({checkpoint.tensors[name].dtype})"
        for name in expected.keys() & checkpoint.tensors.keys()
        if checkpoint.tensors[name].dtype not in WEIGHT_DTYPES
    )
    empty = [
        f"{everything[name].name} is {_axes(stored_shapes[name])}, expected {_axes(shape)}"
        for name, shape in sorted(expected.items())
        if 0 in stored_shapes.get(name, shape)
    ]
    if empty:
        raise D3tomError(
            f"The weights in {checkpoint.folder} are empty: {len(empty):,} of {len(expected):,} tensors hold nothing "
            f"({listing(empty, 4)}). One process of a DeepSpeed ZeRO-3 run saves such a folder, whose weights lie "
            "in all of them. Save it with stage3_gather_16bit_weights_on_model_save, or put it together with the "
            "zero_to_fp32.py that lies beside the run's checkpoints."
        )
    impossible = []
    for name, tensor in checkpoint.quantized.items():
        problem = impossible_quantized(name, tensor.shape, tensor.input_scale is not None)
        if problem is not None and name in expected:
            impossible.append(f"{tensor.name} {problem}")
    parts = [
        f"{label}: {listing(names, _MOST_NAMED)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
            ("not F64, F32, F16 or BF16", unreadable),
            ("in few bits as no build stores it", impossible),
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


def default_generation(config: ModelConfig, folder: Path | None = None) -> GenerationConfig:
    """How a model answers unless told otherwise: its family's own way, changed by its ``generation_config.json``.

    ``folder`` is the checkpoint's; None: the family's settings as they are. Raises :class:`D3tomError`.
    """
    own = family_of(config).generation
    if folder is None or not is_there(folder, _GENERATION_FILE):
        return own
    raw = read_json(find_inside(folder, _GENERATION_FILE))
    given = {field: raw[key] for key, field in _GENERATION_KEYS.items() if raw.get(key) is not None}
    if "remasking" in given:
        given["remasking"] = remasking_mode(given["remasking"])
    if "gen_length" in given:
        given.setdefault("block_length", None)
    limit = config.language.max_sequence_length
    try:
        generation = replace(own, **given)
        if "gen_length" in given and generation.gen_length >= limit:
            raise D3tomError(f"max_new_tokens is {generation.gen_length:,}, and the model has {limit:,} positions.")
    except D3tomError as error:
        raise D3tomError(f"{folder / _GENERATION_FILE} cannot be followed. {error} Correct the file.") from None
    return generation
