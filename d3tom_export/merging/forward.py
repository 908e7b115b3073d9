"""The merged forward pass of the eager model: D3ToM without a KV cache (algorithm.md, "Merging at layer l*").

B batch, L sequence, P prompt, G answer tokens, V visual tokens, K kept, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from d3tom_export.config import MergeConfig
from d3tom_export.merging.importance import most_important, visual_scores
from d3tom_export.merging.merge import NEAR_TIE, NearTie, gather_rows, merge_tokens, near_ties, nearest_kept
from d3tom_export.model.llada import LladaBlock, Rotary, Transformer, rotate


class Merging(NamedTuple):
    """One step's merging: who decides, among whom, and how many stay."""

    config: MergeConfig
    deciders: Tensor
    """(B, G) bool, at least one per row."""
    visual_positions: Tensor
    """(V,) int64, ascending positions in the sequence."""
    keep: int
    """K, 1..V."""
    selection_scores: Tensor | None = None
    """(B, V) float32 from outside, for the policies that look at no attention ("random", "uniform")."""
    turned: tuple[NearTie, ...] = ()
    """Near-ties that go the other way, to know what a runtime that rounds otherwise may give."""
    find_near_ties: bool = False
    """Whether to look for near-ties, which takes two more searches a merge."""
    near_tie: float = NEAR_TIE
    """The difference of cosine similarity that counts as one."""


class ForwardResult(NamedTuple):
    """``logits`` (B, G, rows of the head); after a merge ``scores`` (B, V) and ``kept`` (B, K), indices into the V.

    ``near_ties``, where they are looked for, are the tokens that might as well have joined another.
    """

    logits: Tensor
    scores: Tensor | None = None
    kept: Tensor | None = None
    near_ties: tuple[NearTie, ...] = ()


def select(merging: Merging, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B, V) and the kept tokens (B, K) from rotated ``queries`` (B, H, S, d) and ``keys`` (B, H, L, d)."""
    scores = merging.selection_scores
    if scores is None:
        policy = merging.config.select
        scores = visual_scores(policy, queries, keys, merging.deciders, merging.visual_positions)
    return scores, most_important(scores, merging.keep)


def surviving_positions(length: int, visual_positions: Tensor, kept: Tensor) -> Tensor:
    """Ascending positions (B, L-V+K) of all non-visual and all kept tokens of a sequence of ``length``."""
    survives = torch.ones(kept.shape[0], length, dtype=torch.bool, device=kept.device)
    survives[:, visual_positions] = False
    survives.scatter_(1, visual_positions[kept], True)
    return survives.nonzero()[:, 1].view(kept.shape[0], -1)


class MergedBlock(NamedTuple):
    """What the merging block returns: ``x`` (B, L', D), surviving ``positions`` (B, L'), ``scores``, ``kept``."""

    x: Tensor
    positions: Tensor
    scores: Tensor
    kept: Tensor
    near_ties: tuple[NearTie, ...]


def merging_block(block: LladaBlock, x: Tensor, rotary: Rotary, merging: Merging) -> MergedBlock:
    """Run the block that merges on ``x`` (B, L, D).

    Attention runs unmerged; the residual stream is merged, the attention output only filtered, and the feed-forward
    sees the short sequence.
    """
    normed = block.attn_norm(x)
    heads = block.project(normed)
    queries, keys = rotate(heads.queries, rotary), rotate(heads.keys, rotary)
    attended = block.attend(queries, keys, heads.values)
    scores, kept = select(merging, queries, block.repeat_kv(keys))

    visual = merging.visual_positions
    ties: tuple[NearTie, ...] = ()
    if merging.config.select == "decider":
        nearest = nearest_kept(normed[:, visual], kept, turned=merging.turned)
        merged = merge_tokens(x[:, visual], normed[:, visual], kept, merging.config.aggregate, nearest)
        if merging.find_near_ties:
            ties = tuple(near_ties(normed[:, visual], kept, merging.config.layer, within=merging.near_tie))
    else:
        merged = gather_rows(x[:, visual], kept)
    positions = surviving_positions(x.shape[1], visual, kept)
    residual = x.scatter(1, visual[kept].unsqueeze(-1).expand_as(merged), merged)
    x = gather_rows(residual, positions) + gather_rows(attended, positions)
    return MergedBlock(block.feed_forward(x), positions, scores, kept, ties)


def forward(transformer: Transformer, embeddings: Tensor, answer_tokens: int, merging: Merging | None) -> ForwardResult:
    """One denoising step over the whole sequence: ``embeddings`` (B, L, D) -> logits of the last G rows.

    ``merging`` None runs the plain model.
    """
    x = embeddings
    rotary = transformer.compact_rotary(x)
    scores = kept = None
    ties: tuple[NearTie, ...] = ()
    for index, block in enumerate(transformer.blocks):
        if merging is None or index != merging.config.layer:
            x = block(x, rotary)
            continue
        x, positions, scores, kept, ties = merging_block(block, x, rotary, merging)
        original = merging.config.positions == "original"
        rotary = transformer.rotary(positions) if original else transformer.compact_rotary(x)
    # With a row shift every row predicts the token behind it.
    end = x.shape[1] - int(transformer.config.row_shift)
    return ForwardResult(transformer.logits(x[:, end - answer_tokens : end]), scores, kept, ties)
