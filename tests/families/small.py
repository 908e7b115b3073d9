"""Small checkpoints of the families that spell their names and keys as Hugging Face's Llama does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from d3tom_export.families.registry import family_of, read_config
from tests.conftest import random_state, raw_config

_TOWER = raw_config()["vision_config"]
_SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 640, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "vocab_size": 270, "mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]], "vision_config": _TOWER,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "llada-v": {
        **_SMALL, "architectures": ["LlavaLLaDAModelLM"], "model_type": "llava_llada", "image_aspect_ratio":
        "anyres_max_4", "tie_word_embeddings": False, "eos_token_id": 257, "mm_vision_tower": "siglip2",
        "mask_token_id": 258, "suppressed_token_ids": [257],
    },
    "lavida-dream": {
        **_SMALL, "architectures": ["LlavaDreamForMaskedDiffusion"], "model_type": "llava_dream", "image_aspect_ratio":
        "anyres", "mask_token_id": 258, "eos_token_id": 257, "mm_spatial_pool_mode": "bilinear",
    },
}  # fmt: skip


def write_family(folder: Path, raw: dict[str, Any]) -> Path:
    """A checkpoint of ``raw``'s family in its own spelling: one file, no tokenizer."""
    folder.mkdir(parents=True)
    config = read_config(raw)
    stored_name = family_of(config).stored_name
    (folder / "config.json").write_text(json.dumps(raw))
    state = {stored_name(name): tensor for name, tensor in random_state(config).items()}
    save_file(state, folder / "model.safetensors")
    return folder
