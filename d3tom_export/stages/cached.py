"""The stages of the loop with a KV cache: the prompt once, then the answer's rows alone, cut at l*.

A layer's cache has two forms, because the merge and attention want it laid out differently:

* what `prefill` gives and the merge reads: `keys` and `values` (B, P, N, d), token by token, before the rotary
  embedding, so that a token's row is one contiguous piece;
* what attention reads: `attention_keys` and `attention_values` (B, N, C, d), head by head, keys rotated at positions
  0..C-1. `rotate` makes it from the first form once per answer; `merge` writes it, for its C = P - V + K rows, at every
  merge.

Where the prompt is merged at its prefill, three stages take the place of `prefill`: `prompt_front` runs it up to layer
l*, whose input and the caches so far it gives; `prompt_merge` is layer l* on the prompt, merged as in the loop without
a cache; `prompt_back` runs and caches the C rows that are left. In between `front` and `decide` run the answer's mask
rows over the first caches, and `decide` gives the kept set. K = V merges nothing: the three are `prefill` then.

Where questions share what stands before them, `extend` runs the rest of a prompt, S rows, over the cache of that
prefix in attention's form. It is `prefill` under a mask that hides the rest from the prefix. Rest rows come behind the
prefix's in every layer: at P, or at C behind l* where the prefix was merged at its prefill.

No graph made here copies a cache of P rows: attention multiplies the cached and the new keys apart, so they are never
concatenated; grouped queries share a key head by folding into rows instead of repeating it; the merge gathers nothing
but the rows that stay. Bytes moved per step and later layer, at e bytes an element: 2*P*N*d*e read by the merge and
2*C*N*d*e written by it, 2*C*N*d*e read by attention; layers up to l*: 2*P*N*d*e read by attention.

Source: algorithm.md, "With a KV cache". B batch, P prompt, G answer tokens, V visual tokens, K kept, C = P - V + K,
D width, H query heads, N key/value heads, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3tom_export.config import MergeConfig
from d3tom_export.model.llada import LladaBlock, Rotary, Transformer, rotate
from d3tom_export.stages.ops import Head, RotaryStage, batch_rows, compact, kept_by, merge_node, survivors
from d3tom_export.stages.shorten import ShorteningStage

EPSILON = 1e-8
"""What the release adds to the norm that it divides by, so that rows of zeros (a pruned head's) stay zeros."""
_ENLARGED = 2.0**27
"""A power of two by which both sides of that division are multiplied. In float32 the quotient is the same bit for bit,
unless a norm exceeds 2**100; and no optimiser takes the sum for one with zero, which onnxscript does up to 1e-8."""


class _Mixed(NamedTuple):
    """What attention makes of new rows: values mixed (B, H, Q, d), and the weights of the cache (B, N, H/N * Q, C)."""

    values: Tensor
    to_cache: Tensor


def _attend_apart(
    block: LladaBlock, queries: Tensor, keys: Tensor, values: Tensor, cached_keys: Tensor, cached_values: Tensor
) -> _Mixed:
    """Rotated ``queries`` (B, H, Q, d) over a cache and over new ``keys`` and ``values`` (B, N, S, d), keys rotated."""
    batch, _, rows, size = queries.shape
    # Query heads that share a key head become more rows of it.
    queries = queries.reshape(batch, block.n_kv_heads, -1, size) * size**-0.5
    to_cache = queries @ cached_keys.transpose(2, 3)
    to_new = queries @ keys.transpose(2, 3)
    attention = torch.softmax(torch.cat([to_cache, to_new], dim=-1).float(), dim=-1)
    cached_tokens = cached_keys.shape[2]
    to_cache, to_new = attention[..., :cached_tokens], attention[..., cached_tokens:]
    mixed = to_cache.to(values.dtype) @ cached_values + to_new.to(values.dtype) @ values
    return _Mixed(mixed.reshape(batch, block.n_heads, rows, size), to_cache)


class Attended(NamedTuple):
    """A layer's output rows (B, G, D), and its answer rows' attention to the cache (B, H, G, C), float32."""

    x: Tensor
    to_cache: Tensor


class _CachedStage(RotaryStage):
    """A stage whose blocks run the answer's rows over a cache."""

    def run(self, block: LladaBlock, x: Tensor, cached_keys: Tensor, cached_values: Tensor, rotary: Rotary) -> Attended:
        """``block`` on ``x`` (B, G, D) over a cache in attention's form; ``rotary`` holds the answer's angles."""
        heads = block.project(block.attn_norm(x))
        queries, keys = rotate(heads.queries, rotary), rotate(heads.keys, rotary)
        mixed = _attend_apart(block, queries, keys, heads.values, cached_keys, cached_values)
        x = block.feed_forward(x + block.attn_out(mixed.values.transpose(1, 2).flatten(2)))
        return Attended(x, mixed.to_cache.reshape(*mixed.values.shape[:3], cached_keys.shape[2]))

    def answer_angles(self, x: Tensor, cached_keys: Tensor) -> Rotary:
        """Angles of the answer's positions, which follow the cache's."""
        return self.angles_of(torch.arange(x.shape[1]) + cached_keys.shape[2])


def _token_rows(block: LladaBlock, normed: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, S, N, d) of ``normed`` (B, S, D), token by token, before the rotary embedding."""
    shape = (block.n_kv_heads, block.head_size)
    return block.k_proj(normed).unflatten(-1, shape), block.v_proj(normed).unflatten(-1, shape)


class _PromptBlock(NamedTuple):
    """What a block makes of a prompt: rows ``x``, all of them or the last, and the ``keys`` and ``values``."""

    x: Tensor
    keys: Tensor
    values: Tensor


def _run_prompt_block(block: LladaBlock, x: Tensor, rotary: Rotary, *, last_row: bool = False) -> _PromptBlock:
    """``block`` on the prompt's rows ``x`` (B, S, D); with ``last_row`` on the last one's behalf alone."""
    normed = block.attn_norm(x)
    keys, values = _token_rows(block, normed)
    rows, angles = (x[:, -1:], rotary.last(1)) if last_row else (x, rotary)
    asking = normed[:, -1:] if last_row else normed
    queries = block.q_proj(asking).unflatten(-1, (block.n_heads, block.head_size)).transpose(1, 2)
    attended = block.attend(rotate(queries, angles), rotate(keys.transpose(1, 2), rotary), values.transpose(1, 2))
    return _PromptBlock(block.feed_forward(rows + attended), keys, values)


class PrefillStage(RotaryStage):
    """A prompt's rows (B, P, D) -> keys and values (B, P, N, d) of every layer, before the rotary embedding.

    Of the layers from ``first`` on: `prompt_back` is those behind l*, for C rows. The last layer stops at its keys and
    values, since nothing reads its output; but for the last row's with a row shift, which predicts the answer's first
    token: a further output (B, 1).
    """

    LAYERS = "blocks"

    def __init__(self, transformer: Transformer, first: int = 0) -> None:
        super().__init__(transformer)
        self.blocks = transformer.blocks[first:]
        self.head = Head(transformer) if transformer.config.row_shift else None

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        x = rows
        rotary = self.angles(x)
        cache: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            last = index + 1 == len(self.blocks)
            if last and self.head is None:
                cache += _token_rows(block, block.attn_norm(x))
                break
            ran = _run_prompt_block(block, x, rotary, last_row=last)
            x = ran.x
            cache += [ran.keys, ran.values]
        return tuple(cache) if self.head is None else (*cache, self.head(x)[0])


class PromptFrontStage(RotaryStage):
    """Prompt embeddings (B, P, D) -> the input of layer l* (B, P, D), and keys and values of layers 0..l*."""

    LAYERS = "blocks"

    def __init__(self, transformer: Transformer, layer: int) -> None:
        super().__init__(transformer)
        self.blocks = transformer.blocks[: layer + 1]

    def forward(self, prompt_embeddings: Tensor) -> tuple[Tensor, ...]:
        x = prompt_embeddings
        rotary = self.angles(x)
        cache: list[Tensor] = []
        for block in self.blocks[:-1]:
            ran = _run_prompt_block(block, x, rotary)
            x = ran.x
            cache += [ran.keys, ran.values]
        block = self.blocks[-1]
        cache += _token_rows(block, block.attn_norm(x))
        # The exporter refuses to return an input as it is.
        return (x if len(self.blocks) > 1 else x.clone(), *cache)


class PromptMergeStage(ShorteningStage):
    """Layer l* on a prompt whose ``kept`` visual tokens (B, K) are known: attention unmerged, then C rows (B, C, D).

    What is not kept is merged under every policy.
    """

    def __init__(self, transformer: Transformer, merge: MergeConfig) -> None:
        super().__init__(transformer, merge, drops=False)

    def forward(self, prompt_hidden: Tensor, visual_positions: Tensor, kept: Tensor) -> Tensor:
        rotary = self.angles(prompt_hidden)
        normed = self.block.attn_norm(prompt_hidden)
        heads = self.block.project(normed)
        attended = self.block.attend(rotate(heads.queries, rotary), rotate(heads.keys, rotary), heads.values)
        return self.shorten(prompt_hidden, normed, attended, visual_positions, kept)[0]


class ExtendStage(_CachedStage):
    """The rest of a prompt (B, S, D) over its prefix's caches -> keys and values (B, S, N, d) of every layer.

    Rest rows see the prefix and one another; the prefix has not seen them. Keys are before the rotary embedding. The
    last layer, and the further output with a row shift, are as :class:`PrefillStage` has them.
    """

    LAYERS: str | None = "blocks"

    def __init__(self, transformer: Transformer, merge: MergeConfig) -> None:
        super().__init__(transformer)
        self.blocks = transformer.blocks
        self.head = Head(transformer) if transformer.config.row_shift else None
        self._short = merge.layer + 1 if merge.merge_at == "prefill" else len(self.blocks)
        """The first layer whose cache may be a merged one."""
        if self._short < len(self.blocks):
            self.LAYERS = None  # those behind l* read other sizes: no layer stands for all others

    def forward(self, prompt_embeddings: Tensor, *prefix: Tensor) -> tuple[Tensor, ...]:
        x = prompt_embeddings
        cache: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            last = index + 1 == len(self.blocks)
            normed = block.attn_norm(x)
            keys, values = _token_rows(block, normed)
            cache += [keys, values]
            if last and self.head is None:
                break
            cached_keys, cached_values = prefix[2 * index : 2 * index + 2]
            if index in (0, self._short):
                rotary = self.answer_angles(x, cached_keys)
            rows, asking, angles = (x[:, -1:], normed[:, -1:], rotary.last(1)) if last else (x, normed, rotary)
            queries = block.q_proj(asking).unflatten(-1, (block.n_heads, block.head_size)).transpose(1, 2)
            mixed = _attend_apart(
                block,
                rotate(queries, angles),
                rotate(keys.transpose(1, 2), rotary),
                values.transpose(1, 2),
                cached_keys,
                cached_values,
            )
            x = block.feed_forward(rows + block.attn_out(mixed.values.transpose(1, 2).flatten(2)))
        return tuple(cache) if self.head is None else (*cache, self.head(x)[0])


class RotateStage(RotaryStage):
    """One layer's keys and values (B, P, N, d) in attention's form, (B, N, P, d) each, nothing merged."""

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        rotary = self.angles_of(torch.arange(keys.shape[1]))
        # `clone` keeps a transpose of the input from becoming a view of it, which the exporter refuses to return.
        return rotate(keys.transpose(1, 2), rotary), values.transpose(1, 2).clone()


class FrontStage(_CachedStage):
    """Answer embeddings (B, G, D) and the caches of layers 0..l*-1 -> the answer's rows after them."""

    LAYERS = "blocks"

    def __init__(self, transformer: Transformer, layer: int) -> None:
        super().__init__(transformer)
        self.blocks = transformer.blocks[:layer]

    def forward(self, answer_embeddings: Tensor, *cache: Tensor) -> Tensor:
        x = answer_embeddings
        if not len(self.blocks):
            return x.clone()
        rotary = self.answer_angles(x, cache[0])
        for block, keys, values in zip(self.blocks, cache[::2], cache[1::2], strict=True):
            x = self.run(block, x, keys, values, rotary).x
        return x


class DecideStage(_CachedStage):
    """Layer l* unmerged, and which visual tokens the deciders keep: for steps that merge no cache.

    Those are the steps of an unmerged answer, an answer's first, and the ones in which an earlier merge still holds.
    """

    def __init__(self, transformer: Transformer, merge: MergeConfig) -> None:
        super().__init__(transformer)
        self.block = transformer.blocks[merge.layer]

    def forward(
        self,
        hidden: Tensor,
        deciders: Tensor,
        visual_positions: Tensor,
        keep: Tensor,
        attention_keys: Tensor,
        attention_values: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rotary = self.answer_angles(hidden, attention_keys)
        attended = self.run(self.block, hidden, attention_keys, attention_values, rotary)
        # The answer's attention to the cache is at hand, so the deciders' rows of it cost no product of their own.
        rows = attended.to_cache.mean(dim=1)
        scores = (rows * deciders.unsqueeze(-1).to(rows.dtype)).sum(dim=1)
        return attended.x, kept_by(scores.index_select(1, visual_positions), keep)


class MergeStage(DecideStage):
    """:class:`DecideStage`, and the later layers' caches merged onto what is kept. K = V leaves them as they are."""

    def __init__(self, transformer: Transformer, merge: MergeConfig) -> None:
        super().__init__(transformer, merge)
        self._options = merge.cache

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        deciders: Tensor,
        visual_positions: Tensor,
        keep: Tensor,
        attention_keys: Tensor,
        attention_values: Tensor,
        *later: Tensor,
    ) -> tuple[Tensor, ...]:
        merged, kept = super().forward(hidden, deciders, visual_positions, keep, attention_keys, attention_values)
        batch, prompt_tokens = hidden.shape[0], attention_keys.shape[2]
        kept_positions = visual_positions[kept]
        survives = survivors(prompt_tokens, visual_positions, kept_positions)
        sequence = torch.arange(prompt_tokens).expand(batch, prompt_tokens)
        remaining = prompt_tokens - visual_positions.shape[0] + kept.shape[1]
        positions = compact(survives, sequence, remaining)
        rotary = self.angles_of(torch.arange(positions.shape[1]))
        drops = keep < visual_positions.shape[0]

        caches: list[Tensor] = []
        for keys, values in zip(later[::2], later[1::2], strict=True):
            similar_by = keys.mean(dim=2)
            if not self._options.text_targets:
                similar_by = _apart_from_text(similar_by, visual_positions)
            # One search serves both.
            summed = merge_node([keys.flatten(2), values.flatten(2)], similar_by, positions)
            merged_keys, merged_values = (
                self._restored(rows, sums, positions, drops) for rows, sums in zip((keys, values), summed, strict=True)
            )
            caches += [rotate(merged_keys, rotary), merged_values]
        return (merged, kept, *caches)

    def _restored(self, rows: Tensor, summed: Tensor, positions: Tensor, drops: Tensor) -> Tensor:
        """Rows (B, P, N, d) of a cache, ``summed`` onto ``positions`` (B, C), norms restored where any were dropped."""
        shape = rows.shape[2:]
        sums = summed.unflatten(-1, shape)
        if self._options.restore_norm:
            kept = batch_rows(rows.flatten(2), positions).unflatten(-1, shape)
            mean_norm = kept.float().norm(dim=-1).mean(dim=(1, 2), keepdim=True).unsqueeze(-1)
            norm = sums.float().norm(dim=-1, keepdim=True)
            scale = (mean_norm * _ENLARGED) / (norm * _ENLARGED + EPSILON * _ENLARGED)
            # A plain 1, not a tensor of ones: beside that, engines would choose in float16, which holds no such scale.
            sums = (sums * torch.where(drops, scale, 1.0)).to(rows.dtype)
        return sums.transpose(1, 2)


def _apart_from_text(rows: Tensor, visual_positions: Tensor) -> Tensor:
    """Rows (B, P, d) with one more dimension by which no visual token's nearest is a text token: (B, P, d+1).

    Visual unit vectors get +1 and text, reduced to it, -1: a cosine c between visual tokens becomes (c + 1) / 2 >= 0,
    which keeps their order, and one between a visual and a text token is negative. So the merge stays the one node.
    """
    visual = torch.zeros(rows.shape[1], dtype=rows.dtype).scatter(0, visual_positions, 1.0)[:, None]
    side = (2.0 * visual - 1.0).expand(rows.shape[0], -1, -1)
    return torch.cat([F.normalize(rows, dim=-1) * visual, side], dim=-1)


class BackStage(_CachedStage):
    """Answer rows (B, G, D) and the merged caches of layers l*+1..N-1 -> token, confidence, doubt, logits.

    Row by row: with a row shift those of a row are the next slot's, and whoever runs the loop moves them.
    """

    LAYERS = "blocks"

    def __init__(self, transformer: Transformer, layer: int) -> None:
        super().__init__(transformer)
        self.blocks = transformer.blocks[layer + 1 :]
        self.head = Head(transformer)

    def forward(self, merged: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        x = merged
        if len(self.blocks):
            rotary = self.answer_angles(x, cache[0])
            for block, keys, values in zip(self.blocks, cache[::2], cache[1::2], strict=True):
                x = self.run(block, x, keys, values, rotary).x
        return self.head(x)


def loop_modules(transformer: Transformer, merge: MergeConfig, shares_prefix: bool = False) -> dict[str, nn.Module]:
    """The loop's stages by name."""
    prompt: dict[str, nn.Module] = {"prefill": PrefillStage(transformer)}
    if merge.merge_at == "prefill":
        prompt = {
            "prompt_front": PromptFrontStage(transformer, merge.layer),
            "prompt_merge": PromptMergeStage(transformer, merge),
            "prompt_back": PrefillStage(transformer, merge.layer + 1),
        }
    if shares_prefix:
        prompt["extend"] = ExtendStage(transformer, merge)
    return {
        **prompt,
        "rotate": RotateStage(transformer),
        "front": FrontStage(transformer, merge.layer),
        "decide": DecideStage(transformer, merge),
        "merge": MergeStage(transformer, merge),
        "back": BackStage(transformer, merge.layer),
    }
