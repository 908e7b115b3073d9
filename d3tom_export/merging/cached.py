"""D3ToM with LaViDa's prefix KV cache (algorithm.md, "With a KV cache").

B batch, P prompt, G answer tokens, V visual tokens, K kept, P' = P-V+K, H query heads, N key/value heads, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from d3tom_export.merging.forward import ForwardResult, Merging, select, surviving_positions
from d3tom_export.merging.merge import assignment_margin, nearest_kept, runner_up_assignment
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


class MergedCache(NamedTuple):
    """The cache of layers l*+1..N-1 merged onto the tokens that one step kept."""

    layer: int
    """l*."""
    caches: list[LayerCache]
    """Of the layers behind l*, each (B, N, P', d)."""
    scores: Tensor
    """(B, V) that decided."""
    kept: Tensor
    """(B, K), indices into the V visual tokens."""
    margins: list[Tensor]
    """Per layer, how closely its merge was decided: (B,)."""


def _merge_rows(rows: Tensor, target: Tensor, positions: Tensor, restore_norm: bool) -> Tensor:
    """Sum cached rows (B, N, P, d) into their targets and restore the mean norm of the rows that were kept.

    ``target`` (B, P) indexes the survivors (B, P'). One scalar norm per batch row: the release takes the mean over the
    batch too, which is the same at its only batch size, 1, and would tie rows to one another beyond it.
    """
    batch, heads, _, size = rows.shape
    index = target[:, None, :, None].expand(rows.shape)
    sums = rows.new_zeros(batch, heads, positions.shape[1], size).scatter_add(2, index, rows)
    if not restore_norm:
        return sums
    kept = rows.gather(2, positions[:, None, :, None].expand(sums.shape))
    mean_norm = kept.norm(dim=-1).mean(dim=(1, 2))[:, None, None, None]
    return sums * (mean_norm / (sums.norm(dim=-1, keepdim=True) + 1e-8))


def merge_cache(
    cache: LayerCache,
    positions: Tensor,
    *,
    targets: Tensor | None = None,
    restore_norm: bool = True,
    runner_up: bool = False,
) -> tuple[LayerCache, Tensor]:
    """A layer's cache merged onto the surviving prompt ``positions`` (B, P'), and how closely that was decided (B,).

    A dropped position joins the survivor whose head-averaged key is most similar, text included unless ``targets``
    (B, P') bool says which survivors take others in. With ``runner_up`` the closest call goes the other way. Where
    nothing is dropped the cache stays as it is: the release restores no norms then.
    """
    rows = cache.keys.mean(dim=1)
    if positions.shape[1] == rows.shape[1]:
        return cache, rows.new_full((len(rows),), torch.inf)
    assign = runner_up_assignment if runner_up else nearest_kept
    target = assign(rows, positions, targets)
    merged = (_merge_rows(part, target, positions, restore_norm) for part in cache)
    return LayerCache(*merged), assignment_margin(rows, positions, targets)


def _merge_later(
    cache: list[LayerCache], merging: Merging, prompt_tokens: int, scores: Tensor, kept: Tensor
) -> MergedCache:
    layer, options = merging.config.layer, merging.config.cache
    positions = surviving_positions(prompt_tokens, merging.visual_positions, kept)
    targets = None
    if not options.text_targets:
        targets = torch.isin(positions, merging.visual_positions)

    def merge(later: LayerCache, runner_up: bool) -> tuple[LayerCache, Tensor]:
        return merge_cache(later, positions, targets=targets, restore_norm=options.restore_norm, runner_up=runner_up)

    merged = [merge(later, False) for later in cache[layer + 1 :]]
    caches, margins = [cache for cache, _ in merged], [margin for _, margin in merged]
    if merging.runner_up and margins:
        closest = min(range(len(margins)), key=lambda index: float(margins[index].min()))
        caches[closest] = merge(cache[layer + 1 + closest], True)[0]
    return MergedCache(layer, caches, scores, kept, margins)


def forward_cached(
    transformer: Transformer,
    cache: list[LayerCache],
    answer_embeddings: Tensor,
    merging: Merging | None = None,
    held: MergedCache | None = None,
) -> tuple[ForwardResult, MergedCache | None]:
    """One denoising step over the answer rows (B, G, D) with the prompt's ``cache``.

    Layers up to and including l* use the full cache; the later ones a cache merged afresh as ``merging`` says, or the
    one ``held`` from an earlier step, at compact positions. Returns the merged cache too, for a later step to hold.
    """
    x = answer_embeddings
    prompt_tokens = cache[0].keys.shape[2]
    merged = held
    for index, block in enumerate(transformer.blocks):
        layer = cache[index] if merged is None or index <= merged.layer else merged.caches[index - merged.layer - 1]
        heads = block.project(block.attn_norm(x))
        all_keys = torch.cat([layer.keys, heads.keys], dim=2)
        all_values = torch.cat([layer.values, heads.values], dim=2)
        rotary = transformer.rotary(torch.arange(all_keys.shape[2], device=x.device))
        queries, keys = rotate(heads.queries, rotary.last(x.shape[1])), rotate(all_keys, rotary)
        x = block.feed_forward(x + block.attend(queries, keys, all_values))
        if merging is not None and index == merging.config.layer:
            scores, kept = select(merging, queries, block.repeat_kv(keys))
            merged = _merge_later(cache, merging, prompt_tokens, scores, kept)
    logits = transformer.logits(x)
    if merged is None:
        return ForwardResult(logits), None
    margin = torch.stack(merged.margins).amin(dim=0) if merged.margins else None
    return ForwardResult(logits, merged.scores, merged.kept, margin), merged
