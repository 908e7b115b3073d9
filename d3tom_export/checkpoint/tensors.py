"""Names and shapes of a model's tensors, as its config says them (lavida.md A3), and where a folder has them.

The model's modules bear these names, which are LaViDa-LLaDA's; that they agree is tested. Here they are known before
any module is made. Other families store the tensors under names of their own. Imports no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from d3tom_export.checkpoint.quantized import QuantizedTensor, with_quantized
from d3tom_export.checkpoint.stored import stored_tensors
from d3tom_export.checkpoint.wrappers import wrapping
from d3tom_export.config import LanguageConfig, ModelConfig, VisionConfig
from d3tom_export.families.registry import family_of
from d3tom_export.trust.tensors import StoredTensor

Shapes = dict[str, tuple[int, ...]]
Tensor = TypeVar("Tensor")

EMBEDDING_TABLE = "model.transformer.wte.weight"
LANGUAGE_HEAD = "model.transformer.ff_out.weight"
LAYERS = "model.transformer.blocks."
TOWER = "model.vision_tower.vision_tower.vision_model."
TOWER_LAYERS = f"{TOWER}encoder.layers."


def _linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _language_shapes(config: LanguageConfig) -> Shapes:
    width, kv_width, inner = config.d_model, config.n_kv_heads * config.head_size, config.mlp_hidden_size
    shapes: Shapes = {EMBEDDING_TABLE: (config.embedding_size, width)}
    for layer in range(config.n_layers):
        block = f"{LAYERS}{layer}"
        shapes |= {f"{block}.{norm}.weight": (width,) for norm in ("attn_norm", "ff_norm")}
        for name, rows in (("q_proj", width), ("k_proj", kv_width), ("v_proj", kv_width)):
            shapes |= _linear(f"{block}.{name}", rows, width, config.include_qkv_bias)
        shapes |= _linear(f"{block}.attn_out", width, width, bias=False)
        shapes |= _linear(f"{block}.ff_proj", inner, width, bias=False)
        shapes |= _linear(f"{block}.up_proj", inner, width, bias=False)
        shapes |= _linear(f"{block}.ff_out", width, inner, bias=False)
    return shapes | {
        "model.transformer.ln_f.weight": (width,),
        LANGUAGE_HEAD: (config.embedding_size, width),
    }


def tower_shapes(config: VisionConfig, layers: int) -> Shapes:
    """The tensors of the vision tower that is run, ``layers`` deep."""
    width, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: Shapes = {
        f"{TOWER}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{TOWER}embeddings.patch_embedding.bias": (width,),
        f"{TOWER}embeddings.position_embedding.weight": (config.patches_per_side**2, width),
    }
    for layer in range(layers):
        block = f"{TOWER_LAYERS}{layer}"
        shapes |= _norm(f"{block}.layer_norm1", width) | _norm(f"{block}.layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{block}.self_attn.{name}", width, width)
        shapes |= _linear(f"{block}.mlp.fc1", inner, width) | _linear(f"{block}.mlp.fc2", width, inner)
    return shapes


def _vision_shapes(config: VisionConfig, layers: int, d_model: int) -> Shapes:
    projector = _linear("model.mm_projector.0", d_model, config.hidden_size)
    projector |= _linear("model.mm_projector.2", d_model, d_model)
    return tower_shapes(config, layers) | projector | {"model.image_newline": (d_model,)}


def released_shapes(config: ModelConfig, tower_layers: int | None = None) -> Shapes:
    """Every tensor that a checkpoint of ``config`` must hold, with the shape that it is stored in.

    ``tower_layers`` of the vision tower are stored; None: all but the last, as the release keeps them.
    """
    shapes = _language_shapes(config.language)
    if config.vision is None:
        return shapes
    layers = config.vision.num_hidden_layers - 1 if tower_layers is None else tower_layers
    return shapes | _vision_shapes(config.vision, layers, config.language.d_model)


def product_shapes(config: ModelConfig, tower_layers: int | None = None) -> Shapes:
    """:func:`released_shapes`, and of the head the rows in use: what quantizing sees and a quantized folder holds.

    A graph takes a whole head's first rows, and can take no part of codes, whose rows do not lie one after another.
    """
    return released_shapes(config, tower_layers) | {LANGUAGE_HEAD: (config.language.head_rows, config.language.d_model)}


def named_tensors(stored: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """``stored`` tensors of a model by the model's own names; those that it does not know keep theirs."""
    prefix, stored_name = wrapping(stored), family_of(config).stored_name
    whole_tower = None if config.vision is None else config.vision.num_hidden_layers
    ours = {stored_name(name): name for name in released_shapes(config, whole_tower)}
    bare = {name[len(prefix) :]: tensor for name, tensor in stored.items()}
    # A name that is one of ours by chance is no less unknown in a family with others.
    taken = set(ours.values())
    return {ours.get(name, f"(unknown) {name}" if name in taken else name): tensor for name, tensor in bare.items()}


def model_tensors(folder: Path, config: ModelConfig) -> dict[str, StoredTensor | QuantizedTensor]:
    """The tensors of a checkpoint or bundle folder whose config is known, by the model's own names."""
    return named_tensors(with_quantized(stored_tensors(folder), folder), config)


def weight_bytes(folder: Path, config: ModelConfig) -> dict[str, int]:
    """Bytes of the weights that graphs read, by the names that they have there: quantized ones part by part."""
    found: dict[str, int] = {}
    for name, tensor in model_tensors(folder, config).items():
        if isinstance(tensor, QuantizedTensor):
            found |= {name + part.name.removeprefix(tensor.name): part.length for part in tensor.parts}
        else:
            found[name] = tensor.length
    return found
