"""Many questions on one picture in one pass, with merging, for training only.

System text and picture attend only to themselves, so they run once, and each question with its answer slots attends to
them and to itself. Most of a prompt is the picture, so this teaches several times more per second than the real
formats. What the questions' deciders choose together, or chance, or a stride, is merged for all of them.
A merged cache departs from inference: there a question's rows see the whole picture and are part of the cache, here
they read the merged one as its answer does.

Shapes as in ``batches.py``; D model width, H heads, d head size, K visual tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from d3tom_export.merging.cached import LayerCache, merge_cache
from d3tom_export.merging.forward import surviving_positions
from d3tom_export.merging.importance import most_important
from d3tom_export.merging.merge import gather_rows, merge_tokens, nearest_kept
from d3tom_export.model.lavida import Lavida
from d3tom_export.model.llada import Heads, LladaBlock, rotate

from .batches import Asked

LOOK_LAYER = 2
"""Where answers are taught to look at what their question is about: the merge layer of the headline setting."""


@dataclass(frozen=True)
class PackedMerge:
    """How one pass merges the picture's tokens."""

    layer: int
    keep: int
    """K"""
    way: Literal["merge", "drop", "cache"]
    """Residual streams summed, or dropped, or the cached keys and values of later layers summed."""
    deciders: Tensor
    """(N, G) bool"""
    chance: Tensor | None = None
    """(1, V) scores that choose in the deciders' place."""


@dataclass(frozen=True)
class PackedResult:
    """Of all questions."""

    logits: Tensor
    """(N, G, vocabulary)"""
    looks: Tensor
    """(N, G, V): the answers' attention to visual tokens at :data:`LOOK_LAYER`, averaged over heads"""


def visual_tokens(model: Lavida, asked: Asked) -> tuple[Tensor, Tensor]:
    """Visual tokens (1, V, D) of a picture, and the pooled features (views, T, D) they were taken from."""
    features = model.encode_views(asked.pixel_values)
    rows = torch.cat([features.flatten(0, 1), model.model.image_newline[None].to(features.dtype)])
    return rows[asked.packing][None], features


def prefix_embeddings(model: Lavida, asked: Asked, visual: Tensor) -> Tensor:
    """System text and picture: (1, P, D)."""
    head = model.embed_tokens(asked.head_ids[None])
    return torch.cat([head, visual.to(head.dtype)], dim=1)


def _tail_mask(asked: Asked, answer_visible: bool) -> Tensor:
    """Who sees whom among the R rows of a question: (N, 1, R, R) bool."""
    valid, questions = asked.valid, asked.tail_ids.shape[1]
    mask = valid.unsqueeze(-2).expand(*valid.shape, valid.shape[-1]).clone()
    if not answer_visible:
        mask[:, :questions, questions:] = False
    mask.diagonal(dim1=-2, dim2=-1).fill_(True)  # padding rows need something to look at
    return mask.unsqueeze(1)


def _attend_prefix(block: LladaBlock, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What :meth:`LladaBlock.attend` gives, in steps: with gradients half as long on a CPU as the fused product."""
    weights = (queries * block.head_size**-0.5 @ keys.transpose(-1, -2)).softmax(-1).to(values.dtype)
    return block.attn_out((weights @ values).transpose(1, 2).flatten(2))


def _attend_tail(
    block: LladaBlock, x: Tensor, heads: Heads, keys: Tensor, prefix: LayerCache, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The block on tails ``x`` (N, R, D) over a prefix with rotated ``keys``; and the attention (N, H, R, P')."""
    # Scores against the shared prefix in one product, against the question's own rows in another.
    scale = block.head_size**-0.5
    number, head_count, rows, size = heads.queries.shape
    queries = (heads.queries * scale).transpose(0, 1).reshape(head_count, number * rows, size)
    shared = (queries @ prefix.keys[0].transpose(-1, -2)).view(head_count, number, rows, -1).transpose(0, 1)
    own = (heads.queries * scale @ keys.transpose(-1, -2)).masked_fill(~mask, -1e4)
    weights = torch.cat([shared, own], dim=-1).softmax(-1).to(heads.values.dtype)
    to_prefix, to_own = weights.split([shared.shape[-1], rows], dim=-1)
    mixed = to_prefix.transpose(0, 1).reshape(head_count, number * rows, -1) @ prefix.values[0]
    mixed = mixed.view(head_count, number, rows, size).transpose(0, 1) + to_own @ heads.values
    return block.feed_forward(x + block.attn_out(mixed.transpose(1, 2).flatten(2))), to_prefix


def _kept(merge: PackedMerge, looks: Tensor) -> Tensor:
    """The kept tokens (1, K), by what all questions' deciders look at (N, G, V) or by chance."""
    scores = merge.chance
    if scores is None:
        scores = (looks.detach() * merge.deciders.unsqueeze(-1)).sum((0, 1))[None]
    return most_important(scores, merge.keep)


def answer_questions(
    model: Lavida,
    asked: Asked,
    prefix: Tensor,
    answer_ids: Tensor,
    answer_visible: bool,
    merge: PackedMerge | None = None,
    depth: int | None = None,
) -> PackedResult:
    """Answer all questions from ``answer_ids`` (N, G) on the embedded ``prefix`` (1, P, D).

    ``answer_visible`` lets a question see its own answer slots, as full attention does and prefix mode does not; of the
    blocks the first ``depth`` are run.
    """
    transformer = model.transformer
    answers = answer_ids.shape[1]
    head = len(asked.head_ids)
    visual = torch.arange(head, asked.prefix)
    tail = model.embed_tokens(torch.cat([asked.tail_ids, answer_ids], dim=-1))
    mask, behind = _tail_mask(asked, answer_visible), asked.positions
    length, kept = asked.prefix, None
    for index, block in enumerate(transformer.blocks[:depth]):
        normed = block.attn_norm(prefix)
        heads = block.project(normed)
        plain = transformer.rotary(torch.arange(prefix.shape[1]))
        own = block.project(block.attn_norm(tail))
        keys = rotate(heads.keys, plain)
        cache = LayerCache(keys, heads.values)
        if kept is not None and merge is not None and merge.way == "cache":
            positions = surviving_positions(asked.prefix, visual, kept)
            target = nearest_kept(heads.keys.mean(dim=1), positions)
            rows = merge_cache(LayerCache(heads.keys, heads.values), target, positions)
            cache = LayerCache(rotate(rows.keys, transformer.rotary(torch.arange(len(positions[0])))), rows.values)
        angles = transformer.rotary(torch.where(asked.valid, behind - (asked.prefix - length), 0))
        own = own._replace(queries=rotate(own.queries, angles))
        tail, to_prefix = _attend_tail(block, tail, own, rotate(own.keys, angles), cache, mask)
        if index == LOOK_LAYER or (merge is not None and index == merge.layer):
            seen = to_prefix[:, :, -answers:, head:].float().mean(1)
            if index == LOOK_LAYER:
                looks, present = seen, kept
        attended = _attend_prefix(block, rotate(heads.queries, plain), keys, heads.values)
        if merge is not None and index == merge.layer:
            kept = _kept(merge, seen)
            length = asked.prefix - len(visual) + merge.keep
            if merge.way != "cache":
                rows = gather_rows(prefix[:, visual], kept)
                if merge.way == "merge":
                    rows = merge_tokens(prefix[:, visual], normed[:, visual], kept)
                prefix = torch.cat([prefix[:, :head], rows], dim=1)
                attended = torch.cat([attended[:, :head], gather_rows(attended[:, visual], kept)], dim=1)
        prefix = block.feed_forward(prefix + attended)
    if present is not None and looks.shape[-1] != len(visual):  # merged before answers looked
        looks = looks.new_zeros(*looks.shape[:2], len(visual)).index_copy(2, present[0], looks)
    return PackedResult(transformer.logits(tail[:, -answers:]), looks)
