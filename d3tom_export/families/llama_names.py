"""Tensor names and config keys of models that were written on Hugging Face's Llama or Qwen2 (spec-llada-v.md, 1)."""

from __future__ import annotations

from collections.abc import Mapping

_BLOCK: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_OUTSIDE: Mapping[str, str] = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}
_BLOCKS = "model.transformer.blocks."


def llama_name(name: str) -> str:
    """The stored name of the model's tensor ``name``; what stands before the transformer keeps its own."""
    if not name.startswith(_BLOCKS):
        return _OUTSIDE.get(name, name)
    layer, module, kind = name[len(_BLOCKS) :].split(".")
    return f"model.layers.{layer}.{_BLOCK[module]}.{kind}"


LLAMA_REQUIRED = (
    "d_model",
    "n_layers",
    "n_heads",
    "mlp_hidden_size",
    "vocab_size",
    "rope_theta",
    "rms_norm_eps",
    "max_sequence_length",
)
"""What no class of theirs has a right default for."""

LLAMA_KEYS: Mapping[str, str] = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "mask_token_id": "mask_token_id",
    "eos_token_id": "eos_token_id",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "max_sequence_length": "max_position_embeddings",
    "banned_token_ids": "suppressed_token_ids",
}
"""``suppressed_token_ids`` is no key of the releases, whose code has such ids as constants: a file may replace them."""
