"""A vision tower from another folder, for a checkpoint that was saved without its own.

The original loads the tower by the name that its config has (``mm_vision_tower``) and lets the checkpoint's tensors
take the place of its own: where the checkpoint has none, the tower stays as it was published. So what is taken is that
published tower, without its last layer (lavida.md A3, A4); or the tower of another checkpoint of ours, as it is stored.
Imports no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d3tom_export.checkpoint.stored import WEIGHT_DTYPES, stored_tensors
from d3tom_export.checkpoint.tensors import TOWER, TOWER_LAYERS, Shapes, tower_shapes
from d3tom_export.config import CONFIG_FILE, VisionConfig
from d3tom_export.errors import D3tomError, listing
from d3tom_export.trust.documents import read_json
from d3tom_export.trust.fields import shown
from d3tom_export.trust.files import find_inside, is_there
from d3tom_export.trust.tensors import StoredTensor

_FIRST = "embeddings.patch_embedding.weight"
"""What every tower has one of, whatever stands before it."""

_SIGLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
"""What transformers' SiglipVisionConfig is without a key."""


def read_tower(folder: Path, config: VisionConfig) -> dict[str, StoredTensor]:
    """The tensors of the vision tower in ``folder`` by the model's own names, held against ``config``.

    ``folder`` is a SigLIP checkpoint as its authors publish it, or one of a whole model with a tower of its own; what
    the features do not use (the text model, the head, the last norm) is passed over. Raises :class:`D3tomError` where
    it has no tower, several, or one of another geometry.
    """
    if not folder.is_dir():
        raise D3tomError(
            f"{folder} is not a folder. --vision-tower takes one with a SigLIP model's {CONFIG_FILE} and safetensors."
        )
    stored = stored_tensors(folder)
    prefixes = sorted(name.removesuffix(_FIRST) for name in stored if name.endswith(f".{_FIRST}") or name == _FIRST)
    if len(prefixes) != 1:
        found = f"several: {listing(prefixes, 4)}" if prefixes else "none"
        raise D3tomError(
            f"{folder} has no vision tower that can be taken: expected one tensor {_FIRST} behind a tower's prefix, "
            f"found {found}. Give the folder of the SigLIP model that the checkpoint's config names."
        )
    (prefix,) = prefixes
    named = {TOWER + name[len(prefix) :]: tensor for name, tensor in stored.items() if name.startswith(prefix)}
    layers = _layers(folder, named, config, published=not prefix.endswith(TOWER))
    expected = tower_shapes(config, layers)
    problems = [*_config_problems(folder, config), *_problems(expected, named)]
    if problems:
        raise D3tomError(
            f"The vision tower in {folder} is another than the checkpoint's config describes: {listing(problems, 8)}. "
            "Give the tower that the config names."
        )
    return {name: named[name] for name in expected}


def _layers(folder: Path, named: Mapping[str, StoredTensor], config: VisionConfig, *, published: bool) -> int:
    """How many layers are run: a published tower loses its last one, one that a model was saved with has lost it."""
    whole = config.num_hidden_layers
    stored = {name[len(TOWER_LAYERS) :].split(".")[0] for name in named if name.startswith(TOWER_LAYERS)}
    if len(stored) not in (whole - 1, whole):
        raise D3tomError(
            f"The vision tower in {folder} has {len(stored):,} layers, expected {whole:,}, or one less where the last, "
            "which is not used, was left out. Give the tower that the checkpoint's config names."
        )
    return whole - 1 if published else len(stored)


def _problems(expected: Shapes, named: Mapping[str, StoredTensor]) -> list[str]:
    problems = []
    for name, shape in expected.items():
        tensor = named.get(name)
        if tensor is None:
            problems.append(f"{name.removeprefix(TOWER)} is missing")
        elif tensor.shape != shape:
            problems.append(f"{tensor.name} is {list(tensor.shape)}, expected {list(shape)}")
        elif tensor.dtype not in WEIGHT_DTYPES:
            problems.append(f"{tensor.name} is of {tensor.dtype}, expected {', '.join(WEIGHT_DTYPES)}")
    return problems


def _config_problems(folder: Path, config: VisionConfig) -> list[str]:
    """What the tower's own config says otherwise: shapes do not tell the number of heads."""
    if not is_there(folder, CONFIG_FILE):
        return []
    raw = read_json(find_inside(folder, CONFIG_FILE))
    siglip = str(raw.get("model_type")).startswith("siglip")
    tower = raw.get("vision_config") if isinstance(raw.get("vision_config"), dict) else raw if siglip else None
    if not isinstance(tower, dict):
        return []
    problems = []
    for key, default in _SIGLIP_DEFAULTS.items():
        found, expected = tower.get(key, default), getattr(config, key)
        if found != expected:
            problems.append(f"its {CONFIG_FILE} has {key} {shown(found)}, expected {shown(expected)}")
    if tower.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        problems.append(f"its {CONFIG_FILE} has hidden_act {shown(tower['hidden_act'])}, expected 'gelu_pytorch_tanh'")
    return problems
