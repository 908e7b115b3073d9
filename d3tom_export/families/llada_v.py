"""LLaDA-V (GSAI-ML/LLaDA-V; spec-llada-v.md)."""

from __future__ import annotations

from d3tom_export.config import GenerationConfig
from d3tom_export.families import lavida_llada, llada
from d3tom_export.families.family import Family, LanguageKeys, Raw, VisionKeys, architectures
from d3tom_export.families.llama_names import LLAMA_KEYS, LLAMA_REQUIRED, llama_name

_SIDE, _GRID = 384, range(1, 7)

LLADA_V_8B: Raw = {
    "architectures": ["LlavaLLaDAModelLM"],
    "model_type": "llava_llada",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 12288,
    "hidden_act": "silu",
    "attention_bias": False,
    "vocab_size": 126464,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 126081,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 16384,
    "tokenizer_model_max_length": 8192,
    "mm_vision_tower": "google/siglip2-so400m-patch14-384",
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": [[_SIDE * columns, _SIDE * rows] for columns in _GRID for rows in _GRID],
}


def _recognises(raw: Raw) -> bool:
    named = "LlavaLLaDAModelLM" in architectures(raw)
    # LaViDa-LLaDA says `llava_llada` too, and spells its keys as LLaDA does.
    return named or (raw.get("model_type") == "llava_llada" and "hidden_size" in raw and "d_model" not in raw)


FAMILY = Family(
    name="llada-v",
    title="LLaDA-V",
    recognises=_recognises,
    language=LanguageKeys(
        keys={**LLAMA_KEYS, "max_prompt_length": "tokenizer_model_max_length"},
        required=LLAMA_REQUIRED,
        fixed={
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "tie_word_embeddings": (False,),
            "rope_scaling": (None,),
        },
        # Constants of its `generate_with_embeds`: the mask; end of text, start of text, both header tokens.
        constants={
            "mask_token_id": 126336,
            "banned_token_ids": (126080, 126081, 126346, 126347),
            "include_qkv_bias": False,
        },
    ),
    vision=VisionKeys(
        towers=("siglip2-so400m-patch14-384",),
        required=("image_aspect_ratio", "mm_patch_merge_type", "mm_projector_type"),
        fixed=lavida_llada.LLAVA_EYES,
        pooled=False,
        aspect="anyres_max_([1-9][0-9]?)",
        pads_several=True,  # as its evaluation does
    ),
    stored_name=llama_name,
    template=llada.TEMPLATE,
    system=lavida_llada.SYSTEM,
    bos=llada.BOS,
    end_tokens=llada.END_TOKENS,
    # generate_demo.py
    generation=GenerationConfig(gen_length=128),
    stop=("<|eot_id|>",),
    geometries={"llada-v-8b": LLADA_V_8B},
)
