"""LaViDa on Dream (jacklishufan/lavida-dream-v1.0-instruct; spec-lavida-dream.md)."""

from __future__ import annotations

from dataclasses import replace

from d3tom_export.config import GenerationConfig
from d3tom_export.families import lavida_llada
from d3tom_export.families.family import Family, LanguageKeys, Raw, Template, architectures
from d3tom_export.families.llama_names import LLAMA_KEYS, LLAMA_REQUIRED, llama_name

LAVIDA_DREAM_7B: Raw = {
    "architectures": ["LlavaDreamForMaskedDiffusion"],
    "model_type": "llava_dream",
    "torch_dtype": "bfloat16",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "hidden_act": "silu",
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "mask_token_id": 151666,
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    **lavida_llada.EYES,
}

QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Dream's tokenizer is Qwen2's, written in Python: its release may have no tokenizer.json (spec-lavida-dream.md, 4)."""


def _recognises(raw: Raw) -> bool:
    named = "LlavaDreamForMaskedDiffusion" in architectures(raw)
    return named or raw.get("model_type") == "llava_dream"


FAMILY = Family(
    name="lavida-dream",
    title="LaViDa-Dream",
    recognises=_recognises,
    language=LanguageKeys(
        keys=LLAMA_KEYS,
        # All of them: the class's defaults are another model's.
        required=(*LLAMA_REQUIRED, "n_kv_heads", "mask_token_id"),
        fixed={"hidden_act": ("silu",), "tie_word_embeddings": (False,), "rope_scaling": (None,)},
        constants={"include_qkv_bias": True},
        row_shift=True,
    ),
    # Its evaluation supplies the tower, whatever the file names.
    vision=replace(lavida_llada.VISION, default_tower=lavida_llada.EYES["mm_vision_tower"]),
    stored_name=llama_name,
    # Dream's own, where the checkpoint brings none.
    template=Template(
        start="<|im_start|>user\n",
        before_system="<|im_start|>system\n",
        after_system="<|im_end|>\n<|im_start|>user\n",
        to_assistant="<|im_end|>\n<|im_start|>assistant\n",
        to_user="<|im_end|>\n<|im_start|>user\n",
        strips=(),
    ),
    system=lavida_llada.SYSTEM,
    bos="<|beginoftext|>",
    end_tokens=("<|im_end|>", "<|endoftext|>"),
    # eval/run_dream.sh, with the top-k that its pinned transformers adds (spec-lavida-dream.md, 6)
    generation=GenerationConfig(gen_length=256, schedule="vanilla", remasking="margin", top_k=50, rank_drawn=True),
    byte_level_bpe=QWEN2_PIECES,
    geometries={"lavida-dream-7b": LAVIDA_DREAM_7B},
)
