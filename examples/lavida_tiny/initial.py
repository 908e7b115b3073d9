"""Starting weights that already look at neighbours.

A vision transformer from random weights spends most of a small budget on finding out that near patches belong
together. Here the position table starts as sines and cosines in channels of its own, and each attention head starts as
a soft look at one fixed offset, so that three layers act like three small convolutions from the first step on.
Everything stays trainable and nothing of this is visible in the checkpoint but the values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from d3tom_export.model.lavida import Lavida

_PERIOD = 32.0
"""Longest wave in patches: more than the grid of 28, so that opposite edges stay apart."""
_OFFSETS = (1.0, 1.5, 2.5)
"""How far, in patches along each axis, the four heads of each layer look."""
_SHARPNESS = 7.0
"""Attention logit of the patch looked at, over those far away."""

SHALLOW = 6
"""Blocks of the language model that learn first."""


def _waves(positions: Tensor, count: int) -> Tensor:
    """``count`` sine/cosine pairs of ``positions`` (N,): (N, 2 * count), sines first."""
    angles = positions[:, None] * (2 * math.pi / _PERIOD) * torch.arange(1, count + 1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _shift(offset: float, count: int) -> Tensor:
    """The matrix (2 * count, 2 * count) that maps :func:`_waves` of x to those of x + offset."""
    angles = offset * (2 * math.pi / _PERIOD) * torch.arange(1, count + 1)
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)])


@torch.no_grad()
def initialise_tower(model: Lavida) -> None:
    """Give the tower of ``model`` its neighbour-looking start."""
    vision = model.config.vision
    assert vision is not None
    tower = model.model.vision_tower.vision_tower.vision_model
    side, width = vision.patches_per_side, vision.hidden_size
    head = width // vision.num_attention_heads
    pairs = head // 4
    places = slice(width - 4 * pairs, width)

    table = torch.zeros(side * side, width)
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    table[:, places] = torch.cat([_waves(columns.float(), pairs), _waves(rows.float(), pairs)], dim=1)
    tower.embeddings.position_embedding.weight.copy_(table)
    patches = tower.embeddings.patch_embedding
    nn.init.normal_(patches.weight, std=1.5 / math.sqrt(patches.weight[0].numel()))
    nn.init.zeros_(patches.bias)
    patches.weight[places] = 0

    # Mean square of the input is about (2 * pairs + content) / width, which the layer norm divides out.
    gain = width / (2 * pairs + 0.5 * (width - 4 * pairs))
    scale = math.sqrt(_SHARPNESS * math.sqrt(head) / (gain * 2 * pairs))
    for layer, offset in zip(tower.encoder.layers, _OFFSETS, strict=True):
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            nn.init.normal_(projection.weight, std=0.1 / math.sqrt(width))
            nn.init.zeros_(projection.bias)
        for number in range(vision.num_attention_heads):
            rows_of_head = slice(number * head, number * head + 4 * pairs)
            shift_x = offset if number % 2 else -offset
            shift_y = offset if number // 2 else -offset
            attention.q_proj.weight[rows_of_head, places] += scale * torch.block_diag(
                _shift(shift_x, pairs), _shift(shift_y, pairs)
            )
            attention.k_proj.weight[rows_of_head, places] += scale * torch.eye(4 * pairs)
        for linear in (attention.v_proj, attention.out_proj, layer.mlp.fc1, layer.mlp.fc2):
            nn.init.normal_(linear.weight, std=0.7 / math.sqrt(linear.in_features))
            nn.init.zeros_(linear.bias)
    for linear in (model.model.mm_projector[0], model.model.mm_projector[2]):
        nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
        nn.init.zeros_(linear.bias)


@torch.no_grad()
def initialise_language(model: Lavida) -> None:
    """Small random weights in the first :data:`SHALLOW` blocks; the others start as identities.

    So a shallow model can learn to look things up, at a third of the work, and grow.
    """
    transformer = model.transformer
    nn.init.normal_(transformer.wte.weight, std=0.5)
    nn.init.normal_(model.model.image_newline, std=0.5)
    nn.init.normal_(transformer.ff_out.weight, std=0.02)
    for index, block in enumerate(transformer.blocks):
        for linear in (block.q_proj, block.k_proj, block.v_proj, block.ff_proj, block.up_proj):
            nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
        for linear in (block.attn_out, block.ff_out):
            nn.init.normal_(linear.weight, std=1 / math.sqrt(2 * SHALLOW * linear.in_features))
            if index >= SHALLOW:
                nn.init.zeros_(linear.weight)
