"""LLaDA-V's packing: bilinear resizing of a grid of token rows, from sizes alone (spec-llada-v.md, 4)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.config import VisionConfig
from d3tom_export.families.llada_v import LLADA_V_8B
from d3tom_export.families.registry import read_config
from d3tom_export.pictures.canvas import best_canvas, count_visual_tokens, unpadded_grid
from d3tom_export.pictures.views import pack_features, packing

# spec-llada-v.md, 4: counted with the original code.
VISUAL_TOKENS = {
    (1, 1): 1485, (300, 200): 1261, (384, 384): 1485, (640, 480): 2929, (1000, 300): 2779, (300, 1000): 2835,
    (100, 1000): 1539, (3, 2000): 1053, (2000, 3): 892, (512, 512): 3699, (768, 768): 3699, (800, 800): 3699,
    (2304, 2304): 3699, (1280, 720): 3649, (1920, 1080): 3649,
}  # fmt: skip


def _eyes() -> VisionConfig:
    vision = read_config(LLADA_V_8B).vision
    assert vision is not None
    return vision


def _original(
    size: tuple[int, int], canvas: tuple[int, int], features: torch.Tensor, newline: torch.Tensor
) -> torch.Tensor:
    """LLaVA's own steps in torch, on features (views, T, D): grid, unpad, resize, newlines, thumbnail first."""
    vision = _eyes()
    side = vision.tokens_per_side
    columns, rows = canvas[0] // 384, canvas[1] // 384
    grid = features[1:].view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)
    _, _, above, left = unpadded_grid(size, canvas, vision)
    grid = grid[:, above : grid.shape[1] - above, left : grid.shape[2] - left]
    _, height, width = grid.shape
    times = (height * width / (4 * side**2)) ** 0.5
    if times > 1.1:
        smaller = (int(height // times), int(width // times))
        grid = F.interpolate(grid[None], smaller, mode="bilinear")[0]
    grid = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], dim=2)
    return torch.cat([features[0], grid.flatten(1).T])


@pytest.mark.parametrize("size", VISUAL_TOKENS)
def test_counts_and_features_are_the_originals(size: tuple[int, int]) -> None:
    vision = _eyes()
    canvas = best_canvas(size, vision.grid_pinpoints)
    packed = packing(size, canvas, vision)
    assert packed.visual_tokens == count_visual_tokens(size, vision) == VISUAL_TOKENS[size]
    views = 1 + canvas[0] * canvas[1] // 384**2
    features = torch.randn(views, 729, 6, generator=torch.Generator().manual_seed(0))
    newline = torch.arange(6.0)
    expected = _original(size, canvas, features, newline).numpy()
    found = pack_features(features.numpy(), newline.numpy(), packed)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_weights_sum_to_one_and_rows_are_there(width: int, height: int) -> None:
    vision = _eyes()
    canvas = best_canvas((width, height), vision.grid_pinpoints)
    packed = packing((width, height), canvas, vision)
    assert packed.visual_tokens == count_visual_tokens((width, height), vision)
    assert packed.rows.min() >= 0
    assert packed.rows.max() == 729 * (1 + canvas[0] * canvas[1] // 384**2)
    if packed.weights is not None:
        np.testing.assert_allclose(packed.weights.sum(axis=1), 1, atol=1e-6)
