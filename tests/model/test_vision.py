"""The vision half of the oracle against SigLIP written out by hand: every other test compares it with itself."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import VisionConfig
from d3tom_export.model.lavida import Lavida
from d3tom_export.model.vision import pool

TOWER = "model.vision_tower.vision_tower.vision_model."


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def _tower_by_hand(state: dict[str, Tensor], pixels: Tensor, patch: int, layers: int, heads: int) -> Tensor:
    """Patches, positions, pre-norm layers with tanh-GELU; no norm after the last (lavida.md B3)."""
    views, _, side, _ = pixels.shape
    grid = side // patch
    patches = pixels.reshape(views, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5).reshape(views, grid**2, -1)
    kernel = state[f"{TOWER}embeddings.patch_embedding.weight"].flatten(1)
    x = patches @ kernel.T + state[f"{TOWER}embeddings.patch_embedding.bias"]
    x = x + state[f"{TOWER}embeddings.position_embedding.weight"]
    for index in range(layers):
        prefix = f"{TOWER}encoder.layers.{index}."

        def linear(name: str, value: Tensor, prefix: str = prefix) -> Tensor:
            return value @ state[f"{prefix}{name}.weight"].T + state[f"{prefix}{name}.bias"]

        normed = _layer_norm(x, state[f"{prefix}layer_norm1.weight"], state[f"{prefix}layer_norm1.bias"])
        q, k, v = (
            linear(f"self_attn.{name}_proj", normed).unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv"
        )
        attention = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        x = x + linear("self_attn.out_proj", (attention @ v).transpose(1, 2).flatten(2))
        normed = _layer_norm(x, state[f"{prefix}layer_norm2.weight"], state[f"{prefix}layer_norm2.bias"])
        hidden = linear("mlp.fc1", normed)
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear("mlp.fc2", hidden)
    return x


def _bilinear_by_hand(line: Tensor, size: int) -> Tensor:
    """Half-pixel bilinear resampling of the first axis, clamped at the borders, without antialias."""
    scale = len(line) / size
    rows = []
    for target in range(size):
        source = max((target + 0.5) * scale - 0.5, 0.0)
        low = int(source)
        high = min(low + 1, len(line) - 1)
        rows.append(line[low] * (1 - (source - low)) + line[high] * (source - low))
    return torch.stack(rows)


@torch.no_grad()
def test_features_are_siglip_then_projector_then_pooling(eager_model: Lavida) -> None:
    state = eager_model.state_dict()
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    x = _tower_by_hand(state, pixels, patch=4, layers=2, heads=2)
    x = x @ state["model.mm_projector.0.weight"].T + state["model.mm_projector.0.bias"]
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    x = x @ state["model.mm_projector.2.weight"].T + state["model.mm_projector.2.bias"]
    grid = x.unflatten(1, (7, 7))
    pooled = torch.stack(
        [_bilinear_by_hand(_bilinear_by_hand(view, 4).transpose(0, 1), 4).transpose(0, 1) for view in grid]
    )
    torch.testing.assert_close(eager_model.encode_views(pixels), pooled.flatten(1, 2), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("patches", "tokens"), [(27, 14), (16, 8), (7, 4)])
def test_pooling_halves_the_side_and_rounds_up(patches: int, tokens: int) -> None:
    config = VisionConfig(8, 8, 2, 1, patches * 2, 2, 1e-6, ((patches * 2, patches * 2),))
    pooled = pool(torch.randn(3, patches**2, 5), config)
    assert pooled.shape == (3, tokens**2, 5)
    assert config.tokens_per_view == tokens**2


def test_even_sides_pool_to_plain_averages() -> None:
    config = VisionConfig(8, 8, 2, 1, 8, 2, 1e-6, ((8, 8),))
    grid = torch.arange(16.0).reshape(1, 16, 1)
    assert pool(grid, config).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_post_layernorm_changes_nothing(checkpoint_folder: Path, eager_model: Lavida, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint_folder, tmp_path / "copy"))
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        save_file({name: t * 7 if ".post_layernorm." in name else t for name, t in state.items()}, path)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(load_model(open_checkpoint(folder)).encode_views(pixels), eager_model.encode_views(pixels))
