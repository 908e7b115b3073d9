"""LaViDa on LLaDA (jacklishufan/lavida-llada-v1.0-instruct; lavida.md A to D)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d3tom_export.config import GenerationConfig
from d3tom_export.families import llada
from d3tom_export.families.family import Family, Raw, VisionKeys, architectures

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""The released system text of conversation ``llada``."""

LLAVA_EYES: Mapping[str, tuple[Any, ...]] = {
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False,),
}
"""What is built of LLaVA's choices, from which the families' eyes come."""

# What a config that lacks one of these means to the release: one plain view, rows without newlines ("flat"), one linear
# layer for a projector, and no pooling that it could name. No resampler is what an absent one means there too.
VISION = VisionKeys(
    towers=("siglip-so400m-patch14-384",),
    required=("image_aspect_ratio", "mm_patch_merge_type", "mm_projector_type", "mm_spatial_pool_mode"),
    fixed={**LLAVA_EYES, "mm_spatial_pool_mode": ("bilinear",)},
    pooled=True,
    aspect="anyres",
)

EYES: dict[str, Any] = {
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_hidden_size": 1152,
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_mode": "bilinear",
}
"""What every LaViDa's config.json says of its eyes (lavida.md A2)."""

_LAVIDA: Raw = {
    **llada.LLADA_8B,
    "architectures": ["LlavaLladaForMaskedDiffusion"],
    "model_type": "llava_llada",
    **EYES,
}


def _recognises(raw: Raw) -> bool:
    sees = raw.get("mm_vision_tower") is not None or raw.get("vision_config") is not None
    named = "LlavaLladaForMaskedDiffusion" in architectures(raw) or raw.get("model_type") == "llava_llada"
    return named or ("d_model" in raw and sees)


FAMILY = Family(
    name="lavida-llada",
    title="LaViDa-LLaDA",
    recognises=_recognises,
    language=llada.KEYS,
    vision=VISION,
    stored_name=str,
    template=llada.TEMPLATE,
    system=SYSTEM,
    bos=llada.BOS,
    end_tokens=llada.END_TOKENS,
    # predict.py (lavida.md D1), but greedily
    generation=GenerationConfig(gen_length=64, step_ratio=0.5, schedule="shift"),
    geometries={
        "lavida-8b": _LAVIDA,
        # No release has this size: LaViDa's vocabulary and eyes, its head size and ratio of widths, a quarter as large.
        "lavida-2b": {
            **_LAVIDA,
            "d_model": 2048,
            "n_layers": 28,
            "n_heads": 16,
            "n_kv_heads": 16,
            "mlp_hidden_size": 6144,
        },
    },
)
