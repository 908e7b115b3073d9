"""LaViDa's proportions in small: V = 1008, P = 1083, G = 64 in 32 steps, width 512, 12 layers, weights random.

Language only: prompts are random embeddings. For time and memory, never for answers. Run as a program it benches the
combinations of KV cache and merging, with a cache merged at every step and once per block.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.cli.main import main as d3tom_export
from d3tom_export.config import LOOPS, GenerationConfig, Loop, MergeConfig
from d3tom_export.cost.bench import random_prompt
from d3tom_export.cost.flops import Workload
from d3tom_export.export.assemble import write_stages
from d3tom_export.export.request import StageRequest
from d3tom_export.families.registry import read_config
from d3tom_export.loop.backend import Prompt
from d3tom_export.model.lavida import Lavida
from d3tom_export.process import claim

TEXT_TOKENS, VISUAL_TOKENS = 75, 1008

CONFIG = {
    "d_model": 512, "n_layers": 12, "n_heads": 8, "n_kv_heads": 8, "mlp_hidden_size": 1536, "vocab_size": 6144,
    "embedding_size": 6144, "mask_token_id": 6143, "eos_token_id": 6142, "rope": True, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "max_sequence_length": 8192, "include_bias": False, "weight_tying": False,
    "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms",
}  # fmt: skip


@dataclass(frozen=True)
class Proportions:
    """A model's sizes and those of what it answers."""

    config: Mapping[str, Any]
    """In the released spelling."""
    text_tokens: int
    visual_tokens: int
    merge: MergeConfig
    generation: GenerationConfig

    @property
    def work(self) -> Workload:
        prompt_tokens = self.text_tokens + self.visual_tokens
        return Workload(prompt_tokens, self.visual_tokens, self.generation.gen_length)

    def prompt(self) -> Prompt:
        """Random embeddings."""
        language = read_config(dict(self.config)).language
        return random_prompt(language, self.text_tokens, self.visual_tokens)


LAVIDA = Proportions(
    CONFIG, TEXT_TOKENS, VISUAL_TOKENS, MergeConfig(2, 0.9), GenerationConfig(64, step_ratio=0.5, schedule="shift")
)
SMALL = Proportions(
    CONFIG | {"d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 64, "vocab_size": 96,
              "embedding_size": 96, "mask_token_id": 95, "eos_token_id": 94},
    text_tokens=10, visual_tokens=48, merge=MergeConfig(1, 0.7),
    generation=GenerationConfig(8, step_ratio=0.5, schedule="shift"),
)  # fmt: skip
"""Sizes at which everything runs in a moment and no time means anything."""


def write_checkpoint(folder: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    """Write a checkpoint of ``config`` with random weights into ``folder`` in the released format."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    model = Lavida(read_config(dict(config)))
    state = {
        name: torch.ones(tensor.shape)
        if tensor.dim() == 1
        else torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
        for name, tensor in model.state_dict().items()
    }
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    return folder


def build(
    scratch: Path,
    merge: MergeConfig,
    generation: GenerationConfig,
    loops: Sequence[Loop],
    config: Mapping[str, Any] = CONFIG,
) -> Path:
    """Checkpoint and bundle, with graphs in every CPU precision, below ``scratch``; returns the bundle's folder."""
    checkpoint = open_checkpoint(write_checkpoint(scratch / "proportions", config))
    folder = scratch / "lavida-proportions"
    folder.mkdir()
    write_stages(checkpoint, StageRequest(merge, tuple(loops), ("int8",)), generation, folder)
    return folder


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Answers per combination.")
def main(rounds: int) -> None:
    """Build the bundle and bench it twice."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = build(Path(scratch), LAVIDA.merge, LAVIDA.generation, LOOPS)
        sizes = ["--visual-tokens", str(VISUAL_TOKENS), "--text-tokens", str(TEXT_TOKENS), "--rounds", str(rounds)]
        for remerge in ("every-step", "per-block"):
            d3tom_export(["bench", str(folder), *sizes, "--remerge", remerge], standalone_mode=False)


if __name__ == "__main__":
    claim()
    main()
