"""A checkpoint at LaViDa's proportions in small: V = 1008, P = 1083, width 512, 12 layers, weights random.

Language only: prompts are random embeddings. For time and memory, never for answers.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from d3tom_export.config import ModelConfig
from d3tom_export.model.lavida import Lavida

TEXT_TOKENS, VISUAL_TOKENS = 75, 1008

CONFIG = {
    "d_model": 512, "n_layers": 12, "n_heads": 8, "n_kv_heads": 8, "mlp_hidden_size": 1536, "vocab_size": 6144,
    "embedding_size": 6144, "mask_token_id": 6143, "eos_token_id": 6142, "rope": True, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "max_sequence_length": 4096,
}  # fmt: skip


def write_checkpoint(folder: Path) -> Path:
    """Write it into ``folder`` in the released format."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    model = Lavida(ModelConfig.from_json(CONFIG))
    state = {
        name: torch.ones(tensor.shape)
        if tensor.dim() == 1
        else torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
        for name, tensor in model.state_dict().items()
    }
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder
