"""The LLaDA transformer: bidirectional LLaMA-style blocks, written plainly because everything is measured against it.

Source: LLaDA-8B's released ``modeling_llada.py`` and ``config.json`` (facts in lavida.md A5). Sub-module names are the
checkpoint's tensor names, so a state dict needs no renaming.

Shapes: B batch, L sequence, S any number of rows, D d_model, H query heads, N key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3tom_export.config import LanguageConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in float32, cast back, then scaled (the release's order of the last two)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Rotary(NamedTuple):
    """Cosines and sines of a set of positions, each (L, d) or (B, 1, L, d) float32."""

    cos: Tensor
    sin: Tensor

    def last(self, rows: int) -> Rotary:
        """The angles of the last ``rows`` positions."""
        return Rotary(self.cos[..., -rows:, :], self.sin[..., -rows:, :])


def rotary_frequencies(head_size: int, theta: float) -> Tensor:
    """Frequencies theta^(-2i/d) of a head's dimension pairs: (d/2,) float32."""
    return 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)


def rotary_angles(positions: Tensor, frequencies: Tensor) -> Rotary:
    """Angles of ``positions``, (L,) or (B, L) int64, in float32 and in half-split (NeoX) order."""
    angles = positions.float().unsqueeze(-1) * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    if positions.dim() == 2:
        angles = angles.unsqueeze(1)
    return Rotary(angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of ``x`` (B, heads, L, d), computed in float32 whatever the dtype of ``x``."""
    x32 = x.float()
    first, second = x32.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x32 * rotary.cos + rotated * rotary.sin).to(x.dtype)


class Heads(NamedTuple):
    """Projected queries (B, H, L, d), keys and values (B, N, L, d), before the rotary embedding."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class LladaBlock(nn.Module):
    """One transformer block; its halves are separate methods because D3ToM merges between them."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_size = config.n_heads, config.n_kv_heads, config.head_size
        kv_size = config.n_kv_heads * config.head_size
        bias = config.include_qkv_bias
        self.attn_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=bias)
        self.k_proj = nn.Linear(config.d_model, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.d_model, kv_size, bias=bias)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)

    def project(self, normed: Tensor) -> Heads:
        """Queries, keys and values of ``normed`` (B, L, D)."""
        queries, keys, values = self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        return Heads(
            queries.unflatten(-1, (self.n_heads, self.head_size)).transpose(1, 2),
            keys.unflatten(-1, (self.n_kv_heads, self.head_size)).transpose(1, 2),
            values.unflatten(-1, (self.n_kv_heads, self.head_size)).transpose(1, 2),
        )

    def repeat_kv(self, x: Tensor) -> Tensor:
        """Key/value heads (B, N, L, d) repeated for grouped queries: (B, H, L, d)."""
        return x if self.n_kv_heads == self.n_heads else x.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Full attention of rotated ``queries`` (B, H, S, d) over rotated ``keys`` (B, N, L, d): (B, S, D).

        ``mask``, boolean and broadcastable to (B, H, S, L), is True where attention is allowed; the released model
        never masks, training does.
        """
        mixed = F.scaled_dot_product_attention(queries, self.repeat_kv(keys), self.repeat_kv(values), attn_mask=mask)
        return self.attn_out(mixed.transpose(1, 2).flatten(2))

    def feed_forward(self, x: Tensor) -> Tensor:
        """``x`` (B, L, D) plus its SwiGLU feed-forward."""
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None = None) -> Tensor:
        heads = self.project(self.attn_norm(x))
        x = x + self.attend(rotate(heads.queries, rotary), rotate(heads.keys, rotary), heads.values, mask)
        return self.feed_forward(x)


class Transformer(nn.Module):
    """Embedding table, blocks, final norm and language head under their released names (``ff_out`` is the head)."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_rows, config.d_model)
        # torch's ModuleList is not generic; the annotation says what it holds.
        self.blocks: Sequence[LladaBlock] = nn.ModuleList(  # type: ignore[assignment]
            LladaBlock(config) for _ in range(config.n_layers)
        )
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_out = nn.Linear(config.d_model, config.head_rows, bias=False)

    def rotary(self, positions: Tensor) -> Rotary:
        """Angles of ``positions`` ((L,) or (B, L) int64) for every block of this model."""
        frequencies = rotary_frequencies(self.config.head_size, self.config.rope_theta)
        return rotary_angles(positions, frequencies.to(positions.device))

    def compact_rotary(self, x: Tensor) -> Rotary:
        """Angles of positions 0..L-1 for ``x`` (B, L, D)."""
        return self.rotary(torch.arange(x.shape[1], device=x.device))

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and language head of the rows of ``x`` (B, S, D): (B, S, rows of the head)."""
        return self.ff_out(self.ln_f(x))
