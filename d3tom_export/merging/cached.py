"""D3ToM with LaViDa's prefix KV cache (algorithm.md, "With a KV cache").

B batch, P prompt, G answer tokens, V visual tokens, K kept, P' = P-V+K, H query heads, N key/value heads, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from d3tom_export.merging.forward import ForwardResult, Merging, select, surviving_positions
from d3tom_export.merging.merge import nearest_kept
from d3tom_export.model.llada import Transformer, rotate


class LayerCache(NamedTuple):
    """One layer's prompt keys (before the rotary embedding) and values, each (B, N, P, d)."""

    keys: Tensor
    values: Tensor


def prefill(transformer: Transformer, prompt_embeddings: Tensor) -> list[LayerCache]:
    """Run the prompt (B, P, D) alone through every layer and keep its keys and values."""
    x = prompt_embeddings
    rotary = transformer.compact_rotary(x)
    cache = []
    for block in transformer.blocks:
        heads = block.project(block.attn_norm(x))
        cache.append(LayerCache(heads.keys, heads.values))
        x = x + block.attend(rotate(heads.queries, rotary), rotate(heads.keys, rotary), heads.values)
        x = block.feed_forward(x)
    return cache


def _merge_rows(rows: Tensor, target: Tensor, positions: Tensor) -> Tensor:
    """Sum cached rows (B, N, P, d) into their targets and restore the mean norm of the rows that were kept.

    ``target`` (B, P) indexes the survivors (B, P'). One scalar norm per batch row: the release takes the mean over the
    batch too, which is the same at its only batch size, 1, and would tie rows to one another beyond it.
    """
    batch, heads, _, size = rows.shape
    index = target[:, None, :, None].expand(rows.shape)
    sums = rows.new_zeros(batch, heads, positions.shape[1], size).scatter_add(2, index, rows)
    kept = rows.gather(2, positions[:, None, :, None].expand(sums.shape))
    mean_norm = kept.norm(dim=-1).mean(dim=(1, 2))[:, None, None, None]
    return sums * (mean_norm / (sums.norm(dim=-1, keepdim=True) + 1e-8))


def merge_cache(cache: LayerCache, positions: Tensor) -> LayerCache:
    """A layer's cache merged onto the surviving prompt ``positions`` (B, P'): keys and values (B, N, P', d).

    A dropped position joins the survivor, text included, whose head-averaged key is most similar.
    """
    target = nearest_kept(cache.keys.mean(dim=1), positions)
    return LayerCache(_merge_rows(cache.keys, target, positions), _merge_rows(cache.values, target, positions))


def forward_cached(
    transformer: Transformer, cache: list[LayerCache], answer_embeddings: Tensor, merging: Merging | None
) -> ForwardResult:
    """One denoising step over the answer rows (B, G, D) with the prompt's ``cache``.

    Layers up to and including l* use the full cache; the later ones a cache merged afresh, at compact positions.
    """
    x = answer_embeddings
    prompt_tokens = cache[0].keys.shape[2]
    scores = kept = positions = None
    for index, block in enumerate(transformer.blocks):
        layer = cache[index] if positions is None else merge_cache(cache[index], positions)
        heads = block.project(block.attn_norm(x))
        all_keys = torch.cat([layer.keys, heads.keys], dim=2)
        all_values = torch.cat([layer.values, heads.values], dim=2)
        rotary = transformer.rotary(torch.arange(all_keys.shape[2], device=x.device))
        queries, keys = rotate(heads.queries, rotary.last(x.shape[1])), rotate(all_keys, rotary)
        x = block.feed_forward(x + block.attend(queries, keys, all_values))
        if merging is not None and index == merging.config.layer:
            scores, kept = select(merging, queries, block.repeat_kv(keys))
            positions = surviving_positions(prompt_tokens, merging.visual_positions, kept)
    return ForwardResult(transformer.logits(x), scores, kept)
