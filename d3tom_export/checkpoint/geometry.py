"""Named geometries: the sizes of known models, for export, FLOPs and benchmarks without a checkpoint.

A geometry is a ``config.json`` and nothing else. Imports no framework.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d3tom_export.bundled import bundled_model
from d3tom_export.config import CONFIG_FILE, ModelConfig
from d3tom_export.errors import D3tomError, listing
from d3tom_export.trust.documents import read_json

_LAVIDA: dict[str, Any] = {
    "architectures": ["LlavaLladaForMaskedDiffusion"],
    "model_type": "llava_llada",
    "torch_dtype": "bfloat16",
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "rope": True,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_sequence_length": 4096,
    "layer_norm_type": "rms",
    "block_type": "llama",
    "activation_type": "silu",
    "attention_layer_norm": False,
    "weight_tying": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_hidden_size": 1152,
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_mode": "bilinear",
}
"""What LaViDa-LLaDA-8B's config.json says beside its width and depth (lavida.md A1, A2)."""

_SIZES: dict[str, dict[str, int]] = {
    "lavida-8b": {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288},
    # No release has this size: LaViDa's vocabulary and eyes, its head size and its ratio of widths, a quarter as large.
    "lavida-2b": {"d_model": 2048, "n_layers": 28, "n_heads": 16, "n_kv_heads": 16, "mlp_hidden_size": 6144},
}

GEOMETRIES = ("lavida-8b", "lavida-2b", "lavida-tiny")


def raw_geometry(name: str) -> dict[str, Any]:
    """The ``config.json`` of a geometry; "lavida-tiny" is the bundled model's.

    Raises :class:`D3tomError` for a name that is none of :data:`GEOMETRIES`.
    """
    if name == "lavida-tiny":
        return read_json(bundled_model() / CONFIG_FILE)
    if name not in _SIZES:
        raise D3tomError(f"{name!r} is no geometry that this tool knows. Choose one of {listing(GEOMETRIES)}.")
    return {**_LAVIDA, **_SIZES[name]}


def geometry_config(name: str) -> ModelConfig:
    """A geometry as configuration, every stored vocabulary row in use."""
    return ModelConfig.from_json(raw_geometry(name), source=str(Path(name) / CONFIG_FILE))
