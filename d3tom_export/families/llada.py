"""Plain LLaDA, which sees nothing (GSAI-ML/LLaDA-8B; lavida.md A1, C1)."""

from __future__ import annotations

from d3tom_export.config import GenerationConfig
from d3tom_export.families.family import Family, LanguageKeys, Raw, Template, architectures

KEYS = LanguageKeys(
    keys={
        name: name
        for name in (
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "mlp_hidden_size",
            "vocab_size",
            "embedding_size",
            "mask_token_id",
            "eos_token_id",
            "rope_theta",
            "rms_norm_eps",
            "max_sequence_length",
            "include_qkv_bias",
            "multi_query_attention",
            "tie_word_embeddings",
        )
    },
    # The original's dataclass defaults (768 wide, no RoPE, tied weights) describe a different architecture.
    required=(
        "d_model",
        "n_layers",
        "n_heads",
        "mlp_hidden_size",
        "vocab_size",
        "mask_token_id",
        "rope_theta",
        "rms_norm_eps",
        "max_sequence_length",
    ),
    fixed={
        "rope": (True,),
        "block_type": ("llama",),
        "activation_type": ("silu",),
        "layer_norm_type": ("rms",),
        "attention_layer_norm": (False,),
        "weight_tying": (False,),
        "scale_logits": (False,),
        "input_emb_norm": (False,),
        "alibi": (False,),
        "include_bias": (False,),
    },
    # The dataclass has no RoPE, GPT's blocks, SwiGLU, an ordinary layer norm, tied weights and biases. Its other keys
    # here are off by default. An absent `embedding_size` is 50,304 there: the stored table, whose rows are counted,
    # says more than that.
    said=("rope", "block_type", "activation_type", "layer_norm_type", "weight_tying", "include_bias"),
)

TEMPLATE = Template(
    start="<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n",
    before_system="<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n",
    after_system="<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    to_assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    to_user="<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
)
"""The released chat template; a checkpoint's own takes its place (:mod:`d3tom_export.prompt.template`)."""

BOS, END_TOKENS = "<|startoftext|>", ("<|eot_id|>", "<|endoftext|>")

LLADA_8B: Raw = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "torch_dtype": "bfloat16",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
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
}


def _recognises(raw: Raw) -> bool:
    return raw.get("model_type") == "llada" or "LLaDAModelLM" in architectures(raw) or "d_model" in raw


FAMILY = Family(
    name="llada",
    title="LLaDA",
    recognises=_recognises,
    language=KEYS,
    vision=None,
    stored_name=str,
    template=TEMPLATE,
    system=None,
    bos=BOS,
    end_tokens=END_TOKENS,
    # `generate.py` of the release
    generation=GenerationConfig(gen_length=128, block_length=32),
    geometries={"llada-8b": LLADA_8B},
)
