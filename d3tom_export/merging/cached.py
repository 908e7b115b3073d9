"""D3ToM with LaViDa's prefix KV cache (algorithm.md, "With a KV cache"), merged at the steps or once at the prefill.

Merged at the prefill (fast-decoding.md, "Merged prefill"): the prompt runs alone up to layer l*, the answer's mask rows
run over its cache and score the visual tokens, the prompt is merged there as in the loop without a cache, and the later
layers prefill and cache the short prompt. To the steps that is a merged cache that they hold.

Where questions share what stands before them, that prefix is prefilled alone, merged or not, and the rest of the prompt
runs over its cache: an approximation, for the prefix has not seen the question, which in the release it does.

B batch, P prompt, G answer tokens, V visual tokens, K kept, P' = P-V+K, H query heads, N key/value heads, d head size,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from d3tom_export.merging.forward import ForwardResult, Merging, merging_block, select, surviving_positions
from d3tom_export.merging.merge import NearTie, near_ties, nearest_kept
from d3tom_export.model.llada import LladaBlock, Transformer, rotate


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
    x, cache = _run_prompt(transformer, transformer.blocks, prompt_embeddings)
    return Prefilled(cache, _first_logits(transformer, x))


def _run_prompt(transformer: Transformer, blocks: Sequence[LladaBlock], x: Tensor) -> tuple[Tensor, list[LayerCache]]:
    """A prompt's rows ``x`` (B, S, D) after ``blocks``, at positions 0..S-1, and their keys and values in each."""
    rotary = transformer.compact_rotary(x)
    cache = []
    for block in blocks:
        heads = block.project(block.attn_norm(x))
        cache.append(LayerCache(heads.keys, heads.values))
        x = x + block.attend(rotate(heads.queries, rotary), rotate(heads.keys, rotary), heads.values)
        x = block.feed_forward(x)
    return x, cache


def _first_logits(transformer: Transformer, x: Tensor) -> Tensor | None:
    """Of the last of a prompt's rows (B, S, D) after the last layer, where the model has a row shift."""
    return transformer.logits(x[:, -1:]) if transformer.config.row_shift else None


class MergedCache(NamedTuple):
    """The cache of layers l*+1..N-1 merged onto the tokens that one step, or the prefill, kept."""

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


class _Attended(NamedTuple):
    """What a block makes of rows over a cache: ``x`` (B, S, D), rotated ``queries`` (B, H, S, d), all rotated ``keys``
    (B, N, P + S, d), and the ``cache`` with the new rows behind it."""

    x: Tensor
    queries: Tensor
    keys: Tensor
    cache: LayerCache


def _over_cache(transformer: Transformer, block: LladaBlock, x: Tensor, cache: LayerCache) -> _Attended:
    """``block`` on rows ``x`` (B, S, D), an answer's or the rest of a prompt's, behind a prompt's ``cache``."""
    heads = block.project(block.attn_norm(x))
    all_keys = torch.cat([cache.keys, heads.keys], dim=2)
    all_values = torch.cat([cache.values, heads.values], dim=2)
    rotary = transformer.rotary(torch.arange(all_keys.shape[2], device=x.device))
    queries, keys = rotate(heads.queries, rotary.last(x.shape[1])), rotate(all_keys, rotary)
    x = block.feed_forward(x + block.attend(queries, keys, all_values))
    return _Attended(x, queries, keys, LayerCache(all_keys, all_values))


def extend(transformer: Transformer, prefix: Sequence[LayerCache], rest_embeddings: Tensor) -> Prefilled:
    """Run the rest of a prompt (B, S, D) over the caches of its prefix, one of each layer, and put it behind them.

    Rest rows attend to the prefix and to one another. Their positions follow the rows that their layer's cache has,
    which are fewer behind l* where the prefix was merged at its prefill.
    """
    x, cache = rest_embeddings, []
    for block, rows in zip(transformer.blocks, prefix, strict=True):
        attended = _over_cache(transformer, block, x, rows)
        x = attended.x
        cache.append(attended.cache)
    return Prefilled(cache, _first_logits(transformer, x))


class ScoredPrompt(NamedTuple):
    """A prompt on its way to being merged, at layer l*."""

    hidden: Tensor
    """(B, P, D), the input of layer l*."""
    cache: list[LayerCache]
    """Of layers 0..l*, each (B, N, P, d)."""
    merging: Merging
    """With scores (B, V), whoever gave them."""


def score_prompt(
    transformer: Transformer, prompt_embeddings: Tensor, answer_embeddings: Tensor, merging: Merging
) -> ScoredPrompt:
    """Run the prompt (B, P, D) alone through layers 0..l*-1, and the answer's rows (B, G, D) over it to score it.

    The deciders of ``merging`` are the answer's mask tokens. Where it has scores from outside, no answer row is run.
    """
    layer = merging.config.layer
    hidden, cache = _run_prompt(transformer, transformer.blocks[:layer], prompt_embeddings)
    block = transformer.blocks[layer]
    normed = block.attn_norm(hidden)
    shape = (block.n_kv_heads, block.head_size)
    keys, values = (project(normed).unflatten(-1, shape).transpose(1, 2) for project in (block.k_proj, block.v_proj))
    cache.append(LayerCache(keys, values))
    if merging.selection_scores is None:
        x = answer_embeddings
        for before, rows in zip(transformer.blocks[: layer + 1], cache, strict=True):
            attended = _over_cache(transformer, before, x, rows)
            x = attended.x
        scores, _ = select(merging, attended.queries, block.repeat_kv(attended.keys))
        merging = merging._replace(selection_scores=scores)
    return ScoredPrompt(hidden, cache, merging)


class MergedPrompt(NamedTuple):
    """What a prompt that was merged at its prefill leaves behind."""

    merged: MergedCache
    logits: Tensor | None
    """As :attr:`Prefilled.logits`."""


def prefill_merged(transformer: Transformer, scored: ScoredPrompt, turned: tuple[NearTie, ...] = ()) -> MergedPrompt:
    """Merge the prompt at layer l* and run the short one (B, P', D) through the later layers, at compact positions.

    As in the loop without a cache: attention over all P rows, residual stream merged, attention output filtered. Visual
    tokens that are not kept are merged under every policy, not dropped. ``turned`` near-ties go the other way.
    """
    merging = scored.merging._replace(turned=turned, find_near_ties=scored.merging.find_near_ties and not turned)
    layer = merging.config.layer
    # The policy has done its part, which is the scores; "decider" is the one whose others are merged.
    merging = merging._replace(config=replace(merging.config, select="decider"))
    rotary = transformer.compact_rotary(scored.hidden)
    short = merging_block(transformer.blocks[layer], scored.hidden, rotary, merging)
    x, caches = _run_prompt(transformer, transformer.blocks[layer + 1 :], short.x)
    merged = MergedCache(layer, caches, short.scores, short.kept, short.near_ties)
    return MergedPrompt(merged, _first_logits(transformer, x))


def forward_cached(
    transformer: Transformer,
    cache: list[LayerCache],
    answer_embeddings: Tensor,
    merging: Merging | None = None,
    held: MergedCache | None = None,
) -> tuple[ForwardResult, MergedCache | None]:
    """One denoising step over the answer rows (B, G, D) with the prompt's ``cache``.

    Layers up to and including l* use the full cache; the later ones a cache merged afresh as ``merging`` says, or the
    one ``held`` from an earlier step or from the prefill, at compact positions. Returns the merged cache too, for a
    later step to hold.

    With a row shift slot j has row j-1's logits, and slot 0 its own, which mean nothing: the prompt's last row predicts
    it (:class:`Prefilled`).
    """
    x = answer_embeddings
    prompt_tokens = cache[0].keys.shape[2]
    merged = held
    for index, block in enumerate(transformer.blocks):
        layer = cache[index] if merged is None or index <= merged.layer else merged.caches[index - merged.layer - 1]
        attended = _over_cache(transformer, block, x, layer)
        x = attended.x
        if merging is not None and index == merging.config.layer:
            scores, kept = select(merging, attended.queries, block.repeat_kv(attended.keys))
            merged = _merge_later(cache, merging, prompt_tokens, scores, kept)
    logits = transformer.logits(x)
    if transformer.config.row_shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    if merged is None:
        return ForwardResult(logits), None
    return ForwardResult(logits, merged.scores, merged.kept, merged.near_ties), merged
