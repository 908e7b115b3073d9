"""Small checkpoints in the exact layouts that the families publish: names and keys are spelt out here once more."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from d3tom_export.families.registry import read_config
from tests.conftest import byte_tokenizer, random_state, raw_config

_TOWER = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 4,
}  # fmt: skip
_LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "hidden_act": "silu",
    "vocab_size": 272, "tie_word_embeddings": False, "rope_scaling": None, "mm_hidden_size": 24,
    "mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad", "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "mm_resampler_type": None, "use_mm_proj": True, "vision_config": _TOWER,
}  # fmt: skip

# Ids of the byte tokenizer: 256 start of text, 257 end of text, 258 the mask, 259 and 260 around a header, 261 end of
# turn. LLaDA-V's own ids are constants of its code; a file may replace them.
CONFIGS: dict[str, dict[str, Any]] = {
    "llada-v": {
        **_LLAMA, "architectures": ["LlavaLLaDAModelLM"], "model_type": "llava_llada", "num_key_value_heads": 4,
        "attention_bias": False, "bos_token_id": 249, "eos_token_id": 257, "pad_token_id": None, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 1024, "tokenizer_model_max_length": 800,
        "mask_token_id": 258, "suppressed_token_ids": [257, 256, 259, 260],
        "mm_vision_tower": "google/siglip2-so400m-patch14-384", "image_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": "(1x1),(1x2),(2x2),(3x3)", "mm_newline_position": "grid",
    },
    "lavida-dream": {
        **_LLAMA, "architectures": ["LlavaDreamForMaskedDiffusion"], "model_type": "llava_dream",
        "num_key_value_heads": 2, "eos_token_id": 257, "pad_token_id": 257, "bos_token_id": 256, "mask_token_id": 258,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 1024, "use_sliding_window": False,
        "mm_vision_tower": "/checkpoints/of/the/authors", "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]], "mm_spatial_pool_stride": 2,
        "mm_spatial_pool_mode": "bilinear",
    },
    "lavida-llada": raw_config(),
    "llada": {
        name: value
        for name, value in raw_config(model_type="llada", architectures=["LLaDAModelLM"]).items()
        if not name.startswith(("mm_", "image_", "vision_"))
    },
}  # fmt: skip

LIKE_LLAMA = ("llada-v", "lavida-dream")
"""Those that spell names and keys as Hugging Face's Llama does."""

_NAMES = {
    r"transformer\.wte": "embed_tokens",
    r"transformer\.ln_f": "norm",
    r"transformer\.blocks": "layers",
    r"\battn_norm\b": "input_layernorm",
    r"\bff_norm\b": "post_attention_layernorm",
    r"\battn_out\b": "self_attn.o_proj",
    r"\bff_proj\b": "mlp.gate_proj",
    r"\b(up_proj)\b": r"mlp.\1",
    r"(layers\.\d+)\.ff_out\b": r"\1.mlp.down_proj",
    r"(layers\.\d+)\.([qkv]_proj)\b": r"\1.self_attn.\2",
}


def published_name(family: str, name: str) -> str:
    """What a checkpoint of ``family`` calls the tensor that LaViDa-LLaDA calls ``name`` (spec-llada-v.md, 1)."""
    if family in ("lavida-llada", "llada") or "vision_tower" in name:
        return name
    if name == "model.transformer.ff_out.weight":
        return "lm_head.weight"
    for pattern, spelt in _NAMES.items():
        name = re.sub(pattern, spelt, name)
    return name


def write_family(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint folder of ``family``: random weights, a byte-level tokenizer; ``None`` removes a key."""
    removed = {name for name, value in changes.items() if value is None}
    write_raw(folder, {name: value for name, value in (CONFIGS[family] | changes).items() if name not in removed}, seed)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_raw(folder: Path, raw: dict[str, Any], seed: int = 0) -> Path:
    """A checkpoint folder of ``raw``, a ``config.json``, with random weights and without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = read_config(raw)
    state = {published_name(config.family, name): tensor for name, tensor in random_state(config, seed).items()}
    if config.vision is not None:  # stored by releases, used by nothing
        post_norm = "model.vision_tower.vision_tower.vision_model.post_layernorm.weight"
        state[post_norm] = torch.ones(config.vision.hidden_size)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(state, folder / "model.safetensors")
    return folder
