"""Forward passes for training: many questions on one picture, or one question exactly as at inference.

Packed: system text and picture attend only to themselves, so their keys and values are computed once, and each question
with its answer slots attends to them and to itself. Most of a prompt is the picture, so this teaches several times more
per second than the real formats. Single: the two kinds of attention that inference has, for the last phase.

Shapes as in ``batches.py``; D model width, H heads, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from d3tom_export.model.lavida import Lavida
from d3tom_export.model.llada import Rotary, rotate

from .batches import ANSWER_TOKENS, LONGEST_TAIL, Batch


class Layer(NamedTuple):
    """Rotated keys and values (B, H, P, d) of the prefix in one layer."""

    keys: Tensor
    values: Tensor


class Compaction(NamedTuple):
    """Rotary positions closed up in later layers, as if visual tokens were missing; see ``language.compaction``."""

    first_layer: int
    positions: Tensor
    """(P,) int64 of the prefix"""
    shift: int
    """How much smaller the positions behind the prefix are."""


def _rotaries(model: Lavida, positions: Tensor, closed_up: Tensor | None, first_layer: int) -> list[Rotary]:
    """Each layer's angles: those of ``positions``, from ``first_layer`` on those of ``closed_up``."""
    depth = len(model.transformer.blocks)
    plain = model.transformer.rotary(positions)
    if closed_up is None:
        return [plain] * depth
    return [plain] * first_layer + [model.transformer.rotary(closed_up)] * (depth - first_layer)


def visual_tokens(model: Lavida, batch: Batch) -> tuple[Tensor, Tensor]:
    """Visual tokens (B, V, D) of a batch, and the pooled features (B, views, T, D) they were taken from."""
    features = model.encode_views(batch.pixel_values.flatten(0, 1)).unflatten(0, batch.pixel_values.shape[:2])
    rows = features.flatten(1, 2)
    newline = model.model.image_newline.to(rows.dtype).expand(len(rows), 1, -1)
    return torch.cat([rows, newline], dim=1)[:, batch.packing], features


def prefix_embeddings(model: Lavida, batch: Batch, visual: Tensor) -> Tensor:
    """System text and picture: (B, P, D)."""
    head = model.embed_tokens(batch.head_ids).expand(len(visual), -1, -1)
    return torch.cat([head, visual.to(head.dtype)], dim=1)


def encode_prefix(model: Lavida, x: Tensor, compaction: Compaction | None = None) -> list[Layer]:
    """Run the prefix ``x`` (B, P, D), attending to itself, and keep every layer's keys and values."""
    first_layer, closed_up = (compaction.first_layer, compaction.positions) if compaction else (0, None)
    rotaries = _rotaries(model, torch.arange(x.shape[1]), closed_up, first_layer)
    layers = []
    for block, rotary in zip(model.transformer.blocks, rotaries, strict=True):
        heads = block.project(block.attn_norm(x))
        keys = rotate(heads.keys, rotary)
        layers.append(Layer(keys, heads.values))
        x = x + block.attend(rotate(heads.queries, rotary), keys, heads.values)
        x = block.feed_forward(x)
    return layers


def _tail_mask(valid: Tensor, answer_visible: bool) -> Tensor:
    """Who sees whom among the R rows of a question: (B, N, R, R) bool."""
    mask = valid.unsqueeze(-2).expand(*valid.shape, valid.shape[-1]).clone()
    if not answer_visible:
        mask[..., :LONGEST_TAIL, LONGEST_TAIL:] = False
    mask.diagonal(dim1=-2, dim2=-1).fill_(True)  # padding rows need something to look at
    return mask


def answer_questions(
    model: Lavida,
    layers: list[Layer],
    batch: Batch,
    answer_ids: Tensor,
    answer_visible: bool,
    compaction: Compaction | None = None,
) -> Tensor:
    """Logits (B, N, G, vocabulary) of all answers, from the prefix's ``layers``.

    ``answer_visible`` lets a question see its own answer slots, as full attention does and prefix mode does not.
    """
    _, number, rows = batch.valid.shape
    x = model.embed_tokens(torch.cat([batch.tail_ids, answer_ids], dim=-1)).flatten(1, 2)
    positions = batch.positions.flatten(1)
    first_layer, closed_up = (compaction.first_layer, positions - compaction.shift) if compaction else (0, None)
    rotaries = _rotaries(model, positions, closed_up, first_layer)
    mask = _tail_mask(batch.valid, answer_visible).unsqueeze(1)
    for block, prefix, rotary in zip(model.transformer.blocks, layers, rotaries, strict=True):
        heads = block.project(block.attn_norm(x))
        queries = rotate(heads.queries, rotary) * block.head_size**-0.5
        keys, values = rotate(heads.keys, rotary), heads.values
        # Scores against the shared prefix in one product, against the question's own rows in another.
        shared = queries @ prefix.keys.transpose(-1, -2)
        own_queries, own_keys, own_values = (part.unflatten(2, (number, rows)) for part in (queries, keys, values))
        own = (own_queries @ own_keys.transpose(-1, -2)).masked_fill(~mask, -1e4)
        weights = torch.cat([shared, own.flatten(2, 3)], dim=-1).softmax(-1)
        weights_shared, weights_own = weights.split([shared.shape[-1], rows], dim=-1)
        mixed = weights_shared.to(queries.dtype) @ prefix.values
        mixed = mixed + (weights_own.to(queries.dtype).unflatten(2, (number, rows)) @ own_values).flatten(2, 3)
        x = block.feed_forward(x + block.attn_out(mixed.transpose(1, 2).flatten(2)))
    answers = x.unflatten(1, (number, rows))[:, :, -ANSWER_TOKENS:]
    return model.transformer.logits(answers)


def answer_single(
    model: Lavida,
    prefix: Tensor,
    batch: Batch,
    answer_ids: Tensor,
    prompt_sees_answer: bool,
    compaction: Compaction | None = None,
) -> Tensor:
    """Logits (B, 1, G, vocabulary) exactly as at inference, one question per scene.

    ``prompt_sees_answer`` True is full attention over prefix (B, P, D), question and answer; False is prefix mode, in
    which the whole prompt attends to itself and only the answer attends to everything.
    """
    assert answer_ids.shape[1] == 1, "one question per pass"
    tail = model.embed_tokens(torch.cat([batch.tail_ids, answer_ids], dim=-1)).squeeze(1)
    x = torch.cat([prefix, tail], dim=1)
    count, length = prefix.shape[:2]
    behind = batch.positions.squeeze(1)
    positions = torch.cat([torch.arange(length).expand(count, -1), behind], dim=1)
    first_layer, closed_up = 0, None
    if compaction:
        first_layer = compaction.first_layer
        closed_up = torch.cat([compaction.positions.expand(count, -1), behind - compaction.shift], dim=1)
    rotaries = _rotaries(model, positions, closed_up, first_layer)
    seen = torch.cat([torch.ones(count, length, dtype=torch.bool), batch.valid.squeeze(1)], dim=1)
    mask = seen[:, None, None, :]
    if not prompt_sees_answer:
        mask = mask.repeat(1, 1, x.shape[1], 1)
        mask[:, :, :-ANSWER_TOKENS, -ANSWER_TOKENS:] = False
    for block, rotary in zip(model.transformer.blocks, rotaries, strict=True):
        x = block(x, rotary, mask)
    return model.transformer.logits(x[:, -ANSWER_TOKENS:]).unsqueeze(1)
