"""A LLaDA block against its arithmetic written out by hand, grouped queries and rotary embedding included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from d3tom_export.families.registry import read_config
from d3tom_export.model.llada import LladaBlock, RMSNorm, rotary_angles, rotary_frequencies, rotate
from tests.conftest import raw_config


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _rope(x: Tensor, theta: float) -> Tensor:
    """Pairs (i, i + d/2) turned by position * theta^(-2i/d), one by one, for x (L, d)."""
    length, size = x.shape
    out = x.clone()
    for position in range(length):
        for i in range(size // 2):
            angle = position * theta ** (-2 * i / size)
            a, b = x[position, i], x[position, i + size // 2]
            out[position, i] = a * math.cos(angle) - b * math.sin(angle)
            out[position, i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize(("kv_heads", "bias"), [(4, False), (2, False), (1, True)])
@torch.no_grad()
def test_block_by_hand(kv_heads: int, bias: bool) -> None:
    torch.manual_seed(0)
    raw = raw_config(n_kv_heads=kv_heads, include_qkv_bias=bias)
    config = read_config(raw).language
    block = LladaBlock(config)
    for parameter in block.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(6, 32)
    p = dict(block.named_parameters())

    normed = _rms(x, p["attn_norm.weight"])
    q, k, v = (
        normed @ p[f"{name}_proj.weight"].T + (p[f"{name}_proj.bias"] if bias else 0.0) for name in ("q", "k", "v")
    )
    heads = []
    for head in range(4):
        shared = head // (4 // kv_heads) * 8
        query, key = _rope(q[:, head * 8 : head * 8 + 8], 1e4), _rope(k[:, shared : shared + 8], 1e4)
        heads.append(torch.softmax(query @ key.T / math.sqrt(8), -1) @ v[:, shared : shared + 8])
    y = x + torch.cat(heads, -1) @ p["attn_out.weight"].T
    normed = _rms(y, p["ff_norm.weight"])
    gate = normed @ p["ff_proj.weight"].T
    y = y + (gate * torch.sigmoid(gate) * (normed @ p["up_proj.weight"].T)) @ p["ff_out.weight"].T

    rotary = rotary_angles(torch.arange(6), rotary_frequencies(8, 1e4))
    torch.testing.assert_close(block(x[None], rotary)[0], y, atol=1e-4, rtol=1e-4)


def test_a_row_of_positions_per_batch_row() -> None:
    x = torch.randn(2, 3, 5, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 2, 3, 7, 9]])
    frequencies = rotary_frequencies(8, 1e4)
    both = rotate(x, rotary_angles(positions, frequencies))
    for row in range(2):
        torch.testing.assert_close(both[row], rotate(x[row : row + 1], rotary_angles(positions[row], frequencies))[0])


def test_rms_norm_keeps_statistics_in_float32() -> None:
    norm = RMSNorm(4, 1e-5).to(torch.bfloat16)
    # The square of 300 overflows nothing in float32; in float16-like ranges it would.
    out = norm(torch.full((1, 4), 300.0, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), torch.ones(1, 4), atol=1e-2, rtol=0)
