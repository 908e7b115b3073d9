"""The loop as the release runs it, in plain eager PyTorch: what every speed-up is measured against.

Written from what is known of the release's behaviour (algorithm.md; lavida.md D3, D4, E2, E3), with the work it does
and we do not: the language head and a float64 softmax over every row of the sequence; at l* the attention map of all
heads and rows, beside the attention itself; rows picked by boolean masks; with a KV cache, a copy of the whole cache,
every key rotated anew and every layer's cache merged again, at every step. Weights are those of the eager model, so
that nothing but the loop differs. Batch 1, greedy decoding, as released.

P prompt, G answer tokens, L = P + G, V visual tokens, K kept, D width, H query heads, N key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Prompt
from d3tom_export.loop.denoise import StepRecord, StepResult
from d3tom_export.loop.step_plan import block_plan
from d3tom_export.merging.schedule import kept_tokens, merge_ratio
from d3tom_export.model.lavida import Lavida
from d3tom_export.model.llada import LladaBlock, Rotary, rotate

KeysValues = tuple[Tensor, Tensor]
"""One layer's keys before the rotary embedding, and values, each (1, N, S, d)."""


class _Merge(NamedTuple):
    """What one step merges."""

    visual: Tensor
    """(1, L) bool; with a KV cache (1, P)."""
    deciders: Tensor
    """(1, L) bool; with a KV cache (1, G)."""
    keep: int


class _Output(NamedTuple):
    logits: Tensor
    """(1, L', vocabulary), every row's."""
    kept: Tensor | None
    """(K,) indices into the visual tokens, ascending."""
    cache: list[KeysValues]


def _attention(
    block: LladaBlock, normed: Tensor, past: KeysValues | None, rotary: Rotary, wants_map: bool
) -> tuple[Tensor, Tensor | None, KeysValues]:
    """Attention's output (1, S, D), its map (1, H, S, keys) where wanted, and keys and values with the past's."""
    queries, keys, values = block.project(normed)
    if past is not None:
        keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
    length = keys.shape[2]
    table = Rotary(rotary.cos[:length], rotary.sin[:length])
    rotated = rotate(queries, table.last(queries.shape[2]))
    all_keys = block.repeat_kv(rotate(keys, table))
    mixed = F.scaled_dot_product_attention(rotated, all_keys, block.repeat_kv(values))
    attended = block.attn_out(mixed.transpose(1, 2).flatten(2))
    weights = None
    if wants_map:
        weights = torch.softmax(rotated @ all_keys.transpose(2, 3) * block.head_size**-0.5, dim=-1)
    return attended, weights, (keys, values)


def _kept_mask(weights: Tensor, merge: _Merge) -> Tensor:
    """Which visual tokens stay, (1, keys) bool, by the attention ``weights`` (1, H, rows, keys) of the deciders."""
    keys = merge.visual.shape[1]
    by_row = weights[..., :keys].mean(dim=1)
    scores = by_row.masked_select(merge.deciders.unsqueeze(-1)).view(1, -1, keys).sum(dim=1)
    best = scores.masked_fill(~merge.visual, -torch.inf).topk(merge.keep, dim=-1).indices
    return torch.zeros_like(merge.visual).scatter(1, best, True)


def _merge_sequence(x: Tensor, normed: Tensor, attended: Tensor, merge: _Merge, kept: Tensor) -> Tensor:
    """The shortened residual stream with attention added: (1, L', D). Writes into ``x`` (1, L, D)."""
    dropped = merge.visual & ~kept
    similarity = F.normalize(normed[dropped], dim=-1) @ F.normalize(normed[kept], dim=-1).T
    sources, targets = torch.where(dropped)[1], torch.where(kept)[1]
    x[0].index_add_(0, targets[similarity.argmax(dim=-1)], x[0].index_select(0, sources))
    x[0].index_fill_(0, sources, 0)
    survivors = ~merge.visual | kept
    return (x[survivors] + attended[survivors]).unsqueeze(0)


def _merge_cache(cache: KeysValues, kept: Tensor) -> KeysValues:
    """A layer's cache merged onto the prompt positions ``kept`` (P',), norms restored."""
    keys, _ = cache
    positions = torch.arange(keys.shape[2])
    dropped = positions[torch.isin(positions, kept, invert=True)]
    if not len(dropped):
        return keys.index_select(2, kept), cache[1].index_select(2, kept)
    mean_key = keys.mean(dim=1)[0]
    unit_dropped = F.normalize(mean_key.index_select(0, dropped), dim=-1)
    similarity = unit_dropped @ F.normalize(mean_key.index_select(0, kept), dim=-1).T
    targets = kept[similarity.argmax(dim=-1)]
    merged = []
    for rows in cache:
        flat = rows.permute(0, 2, 1, 3).reshape(rows.shape[2], -1)
        sums = flat.clone().index_add_(0, targets, flat.index_select(0, dropped))
        heads = sums.view(1, rows.shape[2], rows.shape[1], -1).permute(0, 2, 1, 3).index_select(2, kept)
        norm = rows.index_select(2, kept).norm(dim=-1).mean()
        merged.append((heads * (norm / (heads.norm(dim=-1, keepdim=True) + 1e-8))).contiguous())
    return merged[0], merged[1]


class ReleaseLoop:
    """The eager model in the release's loop; with ``kv_cache`` in its prefix mode.

    Args:
        model: The eager model, float32.
        layer: l*.
        kv_cache: Whether the prompt runs once and its keys and values are kept.
    """

    def __init__(self, model: Lavida, layer: int, *, kv_cache: bool) -> None:
        self._model, self._transformer, self._layer = model, model.transformer, layer
        self.kv_cache = kv_cache
        config = self._transformer.config
        # The release computes the angles once and keeps them, too.
        self._rotary = self._transformer.rotary(torch.arange(config.max_sequence_length))
        self._mask_token_id = config.mask_token_id
        self._vocab_rows = config.vocab_rows  # the release would stop at an id that its table lacks

    def _forward(self, x: Tensor, past: Sequence[KeysValues] | None, merge: _Merge | None) -> _Output:
        """All rows of ``x`` (1, L, D), or (1, G, D) behind ``past``, through every layer and the language head."""
        caches = None if past is None else [(keys.clone(), values.clone()) for keys, values in past]
        kept: Tensor | None = None
        present = []
        for index, block in enumerate(self._transformer.blocks):
            merges = merge is not None and index == self._layer
            normed = block.attn_norm(x)
            layer_past = None if caches is None else caches[index]
            attended, weights, layer_present = _attention(block, normed, layer_past, self._rotary, merges)
            present.append(layer_present)
            if not merges:
                x = x + attended
            else:
                assert merge is not None
                assert weights is not None
                kept_mask = _kept_mask(weights, merge)
                kept = kept_mask[merge.visual].nonzero()[:, 0]
                if caches is None:
                    x = _merge_sequence(x, normed, attended, merge, kept_mask)
                else:
                    x = x + attended
                    survivors = (~merge.visual | kept_mask)[0].nonzero()[:, 0]
                    for later in range(index + 1, len(caches)):
                        caches[later] = _merge_cache(caches[later], survivors)
            x = block.feed_forward(x)
        return _Output(self._transformer.logits(x), kept, present)

    @torch.no_grad()
    def answer(
        self, prompt: Prompt, generation: GenerationConfig, merge: MergeConfig, *, logits: bool = False
    ) -> Iterator[StepRecord]:
        """Denoise an answer to ``prompt``, step by step; ``logits`` keeps each step's.

        Raises :class:`D3tomError` for what the release does not do.
        """
        merge = merge.in_loop(self.kv_cache)
        if not generation.greedy or len(prompt.embeddings) != 1 or merge.cache.remerge != "every-step":
            raise D3tomError(
                "The release-style loop answers one prompt, greedily, and merges a cache at every step. "
                "Use another backend for anything else."
            )
        merge.check_cached()
        embeddings = torch.from_numpy(prompt.embeddings)
        before = embeddings.shape[1]
        past = self._forward(embeddings, None, None).cache if self.kv_cache else None
        offset = 0 if self.kv_cache else before
        length = offset + generation.gen_length
        visual = torch.zeros(1, before if self.kv_cache else length, dtype=torch.bool)
        visual[:, torch.from_numpy(prompt.visual_positions)] = True
        x = torch.full((1, length), self._mask_token_id)
        x[:, :offset] = 0
        deciders: Tensor | None = None
        plan = block_plan(generation)

        for number in range(generation.blocks):
            end = offset + (number + 1) * generation.block
            for step, count in enumerate(plan):
                masked = x == self._mask_token_id
                merging, keep = None, len(prompt.visual_positions)
                if merge.schedule != "none" and keep and deciders is not None and bool(deciders.any()):
                    keep = kept_tokens(keep, merge_ratio(merge, step, generation.steps_per_block))
                    merging = _Merge(visual, deciders, keep)
                rows = self._model.embed_tokens(x)
                if not self.kv_cache:
                    rows[:, :offset] = embeddings
                output = self._forward(rows, past, merging)

                x0 = output.logits[..., : self._vocab_rows].argmax(dim=-1)
                probability = torch.softmax(output.logits.double(), dim=-1).gather(-1, x0.unsqueeze(-1)).squeeze(-1)
                missing = length - x0.shape[1]
                if missing:
                    x0 = torch.cat([x0.new_zeros(1, missing), x0], dim=1)
                    probability = torch.cat([probability.new_zeros(1, missing), probability], dim=1)
                probability[:, end:] = -torch.inf
                confidence = torch.where(masked, probability, -torch.inf)
                chosen = torch.where(masked, x0, x)
                transfer = torch.zeros_like(masked)
                transfer[0, confidence[0].topk(int(count)).indices] = True
                x[transfer] = chosen[transfer]
                deciders = transfer
                yield StepRecord(
                    number,
                    step,
                    keep,
                    merging is not None,
                    x[:, offset:].numpy().copy(),
                    transfer[:, offset:].numpy(),
                    np.array([generation.gen_length]),
                    StepResult(
                        token=x0[:, offset:].numpy(),
                        confidence=probability[:, offset:].numpy(),
                        kept=None if output.kept is None else output.kept.unsqueeze(0).numpy(),
                        logits=output.logits[:, -generation.gen_length :].numpy() if logits else None,
                    ),
                )
