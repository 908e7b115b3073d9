"""D3ToM with LaViDa's prefix KV cache (algorithm.md, "With a KV cache").

B batch, P prompt, G answer tokens, V visual tokens, K kept, P' = P-V+K, H query heads, N key/value heads, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from d3tom_export.merging.forward import ForwardResult, Merging, select, surviving_positions
from d3tom_export.merging.merge import NearTie, near_ties, nearest_kept
from d3tom_export.model.llada import Transformer, rotate


class LayerCache(NamedTuple):
    """One layer's prompt keys (before the rotary embedding) and values, each (B, N, P, d)."""

    keys: Tensor
    values: Tensor


class Prefilled(NamedTuple):
    """What a prompt leaves behind."""

    cache: list[LayerCache]
    logits: Tensor | None
    """(B, 1, rows of the head), of the prompt's last row, where the model has a row shift."""


def prefill(transformer: Transformer, prompt_embeddings: Tensor) -> Prefilled:
    """Run the prompt (B, P, D) alone through every layer and keep its keys and values."""
    x = prompt_embeddings
    rotary = transformer.compact_rotary(x)
    cache = []
    for block in transformer.blocks:
        heads = block.project(block.attn_norm(x))
        cache.append(LayerCache(heads.keys, heads.values))
        x = x + block.attend(rotate(heads.queries, rotary), rotate(heads.keys, rotary), heads.values)
        x = block.feed_forward(x)
    return Prefilled(cache, transformer.logits(x[:, -1:]) if transformer.config.row_shift else None)


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
    near_ties: tuple[NearTie, ...]
    """Tokens that might as well have joined another, where they are looked for; of all layers, the closest first."""


def _merge_rows(rows: Tensor, target: Tensor, positions: Tensor, restore_norm: bool) -> Tensor:
    """Sum cached rows (B, N, P, d) into their targets and restore the mean norm of the rows that were kept.

    ``target`` (B, P) indexes the survivors (B, P'). Sums and norms are float32 in every precision. One scalar norm per
    batch row: the release takes the mean over the batch too, which is the same at its only batch size, 1, and would
    tie rows to one another beyond it.
    """
    batch, heads, _, size = rows.shape
    rows32 = rows.float()
    index = target[:, None, :, None].expand(rows.shape)
    sums = rows32.new_zeros(batch, heads, positions.shape[1], size).scatter_add(2, index, rows32)
    if restore_norm:
        kept = rows32.gather(2, positions[:, None, :, None].expand(sums.shape))
        mean_norm = kept.norm(dim=-1).mean(dim=(1, 2))[:, None, None, None]
        sums = sums * (mean_norm / (sums.norm(dim=-1, keepdim=True) + 1e-8))
    return sums.to(rows.dtype)


def merge_cache(cache: LayerCache, target: Tensor, positions: Tensor, restore_norm: bool = True) -> LayerCache:
    """A layer's cache with every position summed into the survivor that ``target`` (B, P) names.

    ``positions`` (B, P') are the survivors.
    """
    return LayerCache(*(_merge_rows(rows, target, positions, restore_norm) for rows in cache))


def _merge_later(
    cache: list[LayerCache], merging: Merging, prompt_tokens: int, scores: Tensor, kept: Tensor
) -> MergedCache:
    """Merge the layers behind l*, each by its own head-averaged keys onto the same survivors.

    A dropped position joins the survivor, text included (unless the options say otherwise), whose head-averaged key is
    most similar. Where none is dropped the caches stay as they are: the release restores no norms then either.
    """
    layer, options = merging.config.layer, merging.config.cache
    if merging.keep == len(merging.visual_positions):
        return MergedCache(layer, cache[layer + 1 :], scores, kept, ())
    positions = surviving_positions(prompt_tokens, merging.visual_positions, kept)
    targets = None if options.text_targets else torch.isin(positions, merging.visual_positions)
    caches: list[LayerCache] = []
    ties: list[NearTie] = []
    for index in range(layer + 1, len(cache)):
        rows = cache[index].keys.mean(dim=1)
        turned = [tie for tie in merging.turned if tie.layer == index]
        target = nearest_kept(rows, positions, targets, turned)
        caches.append(merge_cache(cache[index], target, positions, options.restore_norm))
        if merging.find_near_ties:
            ties += near_ties(rows, positions, index, targets, merging.near_tie)
    return MergedCache(layer, caches, scores, kept, tuple(sorted(ties, key=lambda tie: tie.gap)))


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

    With a row shift slot j has row j-1's logits, and slot 0 its own, which mean nothing: the prompt's last row predicts
    it (:class:`Prefilled`).
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
    if transformer.config.row_shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    if merged is None:
        return ForwardResult(logits), None
    return ForwardResult(logits, merged.scores, merged.kept, merged.near_ties), merged
