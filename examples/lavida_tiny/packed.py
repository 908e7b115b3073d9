"""Many questions on one picture in one pass, with merging, for training only.

System text and picture attend only to themselves, so they run once, and each question with its answer slots attends to
them and to itself, as after a shared prefix at inference. Most of a prompt is the picture, so this teaches several
times more per second than the real formats. In the residual stream, what the questions' deciders choose together, or
chance, or a stride, is merged for all of them; a cache is merged for each question by its own deciders, or by chance.

Shapes as in ``batches.py``; D model width, H heads, d head size, K visual tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from d3tom_export.merging.cached import LayerCache, merge_cache
from d3tom_export.merging.forward import surviving_positions
from d3tom_export.merging.importance import most_important
from d3tom_export.merging.merge import gather_rows, merge_tokens, nearest_kept
from d3tom_export.model.lavida import Lavida
from d3tom_export.model.llada import Heads, LladaBlock, Transformer, rotate

from .batches import Asked

LOOK_LAYER = 2
"""Where answers are taught to look at what their question is about: the merge layer of the headline setting."""
ORDER_LAYER = 4
"""Behind which visual tokens are taught to know where in a description theirs is told of."""
FOLLOW_LAYER = 8
"""Where each token of a description is taught to look at the thing that it is about."""


@dataclass(frozen=True)
class PackedMerge:
    """How one pass merges the picture's tokens."""

    layer: int
    keep: int
    """K"""
    way: Literal["merge", "drop", "cache"]
    """Residual streams summed, or dropped; or each question's cache of later layers, its own rows in it, summed."""
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
    follow: Tensor | None
    """The same at :data:`FOLLOW_LAYER`, where answers still look at the picture itself"""
    rows: Tensor | None
    """(V or K, D): the visual tokens behind :data:`ORDER_LAYER`, those that are left"""
    kept: Tensor | None
    """(K,) int64: which those are, or None: all"""


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


def _attend_prefix(block: LladaBlock, queries: Tensor, cache: LayerCache) -> Tensor:
    """What :meth:`LladaBlock.attend` gives, in steps: with gradients half as long on a CPU as the fused product."""
    weights = (queries * block.head_size**-0.5 @ cache.keys.transpose(-1, -2)).softmax(-1).to(cache.values.dtype)
    return block.attn_out((weights @ cache.values).transpose(1, 2).flatten(2))


def _attend_tail(block: LladaBlock, x: Tensor, heads: Heads, prefix: LayerCache, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The block on tails ``x`` (N, R, D), all rotated, over one ``prefix``; and the attention to it (N, H, R, P')."""
    # Scores against the shared prefix in one product, against the question's own rows in another.
    scale = block.head_size**-0.5
    number, head_count, rows, size = heads.queries.shape
    queries = (heads.queries * scale).transpose(0, 1).reshape(head_count, number * rows, size)
    shared = (queries @ prefix.keys[0].transpose(-1, -2)).view(head_count, number, rows, -1).transpose(0, 1)
    own = (heads.queries * scale @ heads.keys.transpose(-1, -2)).masked_fill(~mask, -1e4)
    weights = torch.cat([shared, own], dim=-1).softmax(-1).to(heads.values.dtype)
    to_prefix, to_own = weights.split([shared.shape[-1], rows], dim=-1)
    mixed = to_prefix.transpose(0, 1).reshape(head_count, number * rows, -1) @ prefix.values[0]
    mixed = mixed.view(head_count, number, rows, size).transpose(0, 1) + to_own @ heads.values
    return block.feed_forward(x + block.attn_out(mixed.transpose(1, 2).flatten(2))), to_prefix


def _own_caches(transformer: Transformer, asked: Asked, prefix: LayerCache, own: Heads, kept: Tensor) -> LayerCache:
    """Each question's merged cache, (N, H, P-V+K+Q, d) with its keys rotated at compact positions.

    As :func:`d3tom_export.merging.cached.forward_cached` has it: the question's rows are part of its prompt, and
    tokens that are not kept may join them. ``prefix`` keys and those of the tails, ``own``, are not rotated yet.
    """
    number, questions = asked.tail_ids.shape
    valid = asked.valid[:, :questions]
    visual = torch.arange(len(asked.head_ids), asked.prefix)

    def prompt(shared: Tensor, tails: Tensor) -> Tensor:
        # Padding has no norm, and keeps to itself.
        rows = tails[:, :, :questions] * valid[:, None, :, None]
        return torch.cat([shared.expand(number, -1, -1, -1), rows], dim=2)

    cache = LayerCache(prompt(prefix.keys, own.keys), prompt(prefix.values, own.values))
    positions = surviving_positions(asked.prefix + questions, visual, kept.expand(number, -1))
    length = positions.shape[1] - questions
    targets = torch.cat([valid.new_ones(number, length), valid], dim=1)
    target = nearest_kept(cache.keys.detach().mean(dim=1), positions, targets)
    merged = merge_cache(cache, target, positions)
    # The norm restored is a mean over survivors, which padding is not.
    share = (positions.shape[1] / targets.sum(-1))[:, None, None, None].to(merged.keys.dtype)
    angles = transformer.rotary((targets.cumsum(-1) - 1) * targets)
    return LayerCache(rotate(merged.keys * share, angles), merged.values * share)


def _attend_own(block: LladaBlock, x: Tensor, heads: Heads, cache: LayerCache, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The block on answers ``x`` (N, G, D), all rotated, each over its question's ``cache`` (N, H, P'+Q, d); and the
    attention to that (N, H, G, P'+Q). ``valid`` (N, Q) tells the question's rows from padding."""
    keys, values = torch.cat([cache.keys, heads.keys], dim=2), torch.cat([cache.values, heads.values], dim=2)
    scores = heads.queries * block.head_size**-0.5 @ keys.transpose(-1, -2)
    cached = cache.keys.shape[2]
    padding = F.pad(~valid, (cached - valid.shape[1], x.shape[1]))
    weights = scores.masked_fill(padding[:, None, None], -1e4).softmax(-1).to(values.dtype)
    mixed = block.attn_out((weights @ values).transpose(1, 2).flatten(2))
    return block.feed_forward(x + mixed), weights[..., :cached]


def _split(heads: Heads, rows: int) -> tuple[Heads, Heads]:
    """The first ``rows`` and the others."""
    return Heads(*(part[:, :, :rows] for part in heads)), Heads(*(part[:, :, rows:] for part in heads))


def _kept(merge: PackedMerge, looks: Tensor) -> Tensor:
    """The kept tokens, by chance or by what deciders look at (N, G, V): together (1, K), or each's own (N, K)."""
    scores = merge.chance
    if scores is None:
        scores = (looks.detach() * merge.deciders.unsqueeze(-1)).sum(1)
        if merge.way != "cache":
            scores = scores.sum(0, keepdim=True)
    return most_important(scores, merge.keep)


def _spread(looks: Tensor, kept: Tensor | None, visual: int) -> Tensor:
    """Attention (N, G, V) of that to the tokens ``kept`` (1 or N, K), which come first; None: to all."""
    if kept is None:
        return looks
    spread = looks.new_zeros(*looks.shape[:2], visual)
    return spread.scatter(2, kept.unsqueeze(1).expand(*looks.shape[:2], -1), looks[..., : kept.shape[1]])


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
    answers, questions = answer_ids.shape[1], asked.tail_ids.shape[1]
    head = len(asked.head_ids)
    visual = torch.arange(head, asked.prefix)
    tail = model.embed_tokens(torch.cat([asked.tail_ids, answer_ids], dim=-1))
    mask, positions = _tail_mask(asked, answer_visible), asked.positions
    kept = follow = rows_seen = rows_kept = None
    own_caches = merge is not None and merge.way == "cache"  # behind its layer: of the picture nothing goes
    for index, block in enumerate(transformer.blocks[:depth]):
        normed = block.attn_norm(prefix)
        heads = block.project(normed)
        plain = transformer.rotary(torch.arange(prefix.shape[1]))
        cache = LayerCache(rotate(heads.keys, plain), heads.values)
        own = block.project(block.attn_norm(tail))
        angles = transformer.rotary(positions)
        turned = own._replace(queries=rotate(own.queries, angles), keys=rotate(own.keys, angles))
        if kept is not None and own_caches:
            own_cache = _own_caches(transformer, asked, LayerCache(heads.keys, heads.values), own, kept)
            of_questions, of_answers = _split(turned, questions)
            question, answer = tail[:, :questions], tail[:, questions:]
            question, _ = _attend_tail(block, question, of_questions, cache, mask[..., :questions, :questions])
            answer, to_prefix = _attend_own(block, answer, of_answers, own_cache, asked.valid[:, :questions])
            tail = torch.cat([question, answer], dim=1)
        else:
            tail, to_prefix = _attend_tail(block, tail, turned, cache, mask)
        if index in (LOOK_LAYER, FOLLOW_LAYER) or (merge is not None and index == merge.layer):
            seen = to_prefix[:, :, -answers:, head:].float().mean(1)
            if index == LOOK_LAYER:
                looks = _spread(seen, kept, len(visual))
            if index == FOLLOW_LAYER and (kept is None or not own_caches):
                follow = _spread(seen, kept, len(visual))
        attended = _attend_prefix(block, rotate(heads.queries, plain), cache)
        if merge is not None and index == merge.layer:
            kept = _kept(merge, seen)
            closed = asked.valid * (len(visual) - merge.keep)
            if merge.way == "cache":  # the prompt stays as it is; its answers read less of it
                closed[:, :questions] = 0
            else:
                rows = gather_rows(prefix[:, visual], kept)
                if merge.way == "merge":
                    rows = merge_tokens(prefix[:, visual], normed[:, visual], kept)
                prefix = torch.cat([prefix[:, :head], rows], dim=1)
                attended = torch.cat([attended[:, :head], gather_rows(attended[:, visual], kept)], dim=1)
            positions = positions - closed
        prefix = block.feed_forward(prefix + attended)
        if index == ORDER_LAYER:
            rows_seen, rows_kept = prefix[0, head:], None if kept is None or own_caches else kept[0]
    return PackedResult(transformer.logits(tail[:, -answers:]), looks, follow, rows_seen, rows_kept)
