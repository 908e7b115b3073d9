"""The tiny checkpoint's config.json: every field of the released one, with small numbers (lavida.md A1, A2)."""

from __future__ import annotations

from typing import Any

EMBEDDING_ROWS = 544
"""Rows stored for the embedding table and head: more than the tokenizer has, as in the release."""

_LANGUAGE: dict[str, Any] = {
    "architectures": ["LlavaLladaForMaskedDiffusion"],
    "model_type": "llava_llada",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.3",
    "d_model": 128,
    "n_layers": 12,
    "n_heads": 4,
    "n_kv_heads": 4,
    "multi_query_attention": None,
    "mlp_hidden_size": 352,
    "mlp_ratio": 4,
    "vocab_size": EMBEDDING_ROWS,
    "embedding_size": EMBEDDING_ROWS,
    "weight_tying": False,
    "tie_word_embeddings": False,  # the head is trained, and read, with the tokenizer's rows alone
    "scale_logits": False,
    "input_emb_norm": False,
    "rope": True,
    "rope_theta": 500000.0,
    "rope_full_precision": True,
    "alibi": False,
    "alibi_bias_max": 8.0,
    "max_sequence_length": 2048,
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-05,
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "include_bias": False,
    "include_qkv_bias": False,
    "activation_type": "silu",
    "block_type": "llama",
    "block_group_size": 1,
    "flash_attention": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "init_cutoff_factor": None,
    "precision": "amp_bf16",
    "use_cache": False,
}

_VISION: dict[str, Any] = {
    "mm_vision_tower": "siglip-tiny-patch8-224",
    "mm_hidden_size": 128,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 224,
        "patch_size": 8,
        "num_channels": 3,
        "layer_norm_eps": 1e-06,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[224, 448], [448, 224], [448, 448], [672, 224], [224, 672]],
    "image_crop_resolution": None,
    "image_split_resolution": None,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": None,
    "mm_pooler_ratio": 2,
    "mm_newline_position": "grid",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "use_mm_proj": True,
    "add_faster_video": False,
    "faster_token_stride": 10,
    "force_sample": False,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "use_pos_skipping": False,
    "pos_skipping_range": 2048,
}


def config_json(mask_id: int, eos_id: int, pad_id: int) -> dict[str, Any]:
    """The whole config.json, for a tokenizer with these special ids."""
    ids = {"mask_token_id": mask_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    return _LANGUAGE | ids | _VISION
