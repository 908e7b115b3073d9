"""The stages of the loop without a KV cache: the whole sequence at every step, cut at l*.

B batch, P prompt, G answer tokens, L = P + G, V visual tokens, K kept, M = L - V + K, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d3tom_export.config import MergeConfig
from d3tom_export.merging.importance import visual_scores
from d3tom_export.model.llada import LladaBlock, Rotary, Transformer, rotate
from d3tom_export.stages.ops import Head, RotaryStage, kept_by, size_of
from d3tom_export.stages.shorten import ShorteningStage


def _run_blocks(blocks: Sequence[LladaBlock], x: Tensor, rotary: Rotary) -> Tensor:
    for block in blocks:
        x = block(x, rotary)
    return x


class FrontStage(RotaryStage):
    """Prompt and answer embeddings -> the residual stream after layers 0..l*-1."""

    LAYERS = "blocks"

    def __init__(self, transformer: Transformer, layer: int) -> None:
        super().__init__(transformer)
        self.blocks = transformer.blocks[:layer]

    def forward(self, prompt_embeddings: Tensor, answer_embeddings: Tensor) -> Tensor:
        hidden = torch.cat([prompt_embeddings, answer_embeddings], dim=1)
        return _run_blocks(self.blocks, hidden, self.angles(hidden)) if len(self.blocks) else hidden


class MergeStage(ShorteningStage):
    """Layer l*: attention unmerged, visual tokens merged, feed-forward on the short sequence."""

    def __init__(self, transformer: Transformer, merge: MergeConfig) -> None:
        super().__init__(transformer, merge, drops=merge.select != "decider")
        self._merge = merge

    def forward(
        self,
        hidden: Tensor,
        deciders: Tensor,
        visual_positions: Tensor,
        keep: Tensor,
        selection_scores: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        rotary = self.angles(hidden)
        normed = self.block.attn_norm(hidden)
        heads = self.block.project(normed)
        queries, keys = rotate(heads.queries, rotary), rotate(heads.keys, rotary)
        attended = self.block.attend(queries, keys, heads.values)

        scores = selection_scores
        if scores is None:
            scores = visual_scores(self._merge.select, queries, self.block.repeat_kv(keys), deciders, visual_positions)
        kept = kept_by(scores, keep)
        x, positions = self.shorten(hidden, normed, attended, visual_positions, kept)
        return (x, kept, positions) if self._merge.positions == "original" else (x, kept)


def _answer_block(block: LladaBlock, x: Tensor, rows: Tensor, rotary: Rotary, answer_rotary: Rotary) -> Tensor:
    """The ``rows`` (G,) of what ``block`` makes of ``x`` (B, M, D): (B, G, D). The others give keys and values only."""
    normed = block.attn_norm(x)
    queries = block.q_proj(normed.index_select(1, rows)).unflatten(-1, (block.n_heads, block.head_size))
    keys, values = (
        project(normed).unflatten(-1, (block.n_kv_heads, block.head_size)).transpose(1, 2)
        for project in (block.k_proj, block.v_proj)
    )
    attended = block.attend(rotate(queries.transpose(1, 2), answer_rotary), rotate(keys, rotary), values)
    return block.feed_forward(x.index_select(1, rows) + attended)


class BackStage(RotaryStage):
    """Layers l*+1..N-1, the last one for the answer's rows alone; final norm, language head, greedy choice."""

    LAYERS = "blocks"

    def __init__(self, transformer: Transformer, layer: int) -> None:
        super().__init__(transformer)
        self.blocks = transformer.blocks[layer + 1 :]
        self.head = Head(transformer)
        # With a row shift the row before predicts a position; before the answer that is the prompt's last, a text row,
        # which no merge takes away.
        self._shift = int(transformer.config.row_shift)

    def forward(self, merged: Tensor, answer_length: Tensor, positions: Tensor | None = None) -> tuple[Tensor, ...]:
        answer_tokens = size_of(answer_length)
        torch._check(answer_tokens >= 1)
        torch._check(answer_tokens + self._shift <= merged.shape[1])
        rows = torch.arange(answer_tokens) + (merged.shape[1] - answer_tokens - self._shift)
        if not len(self.blocks):
            return self.head(merged.index_select(1, rows))
        rotary = self.angles(merged, positions)
        answer_rotary = self.angles_of(rows if positions is None else positions.index_select(1, rows))
        x = _run_blocks(self.blocks[:-1], merged, rotary)
        return self.head(_answer_block(self.blocks[-1], x, rows, rotary, answer_rotary))


def loop_modules(transformer: Transformer, merge: MergeConfig) -> dict[str, nn.Module]:
    """The loop's stages by name."""
    return {
        "front": FrontStage(transformer, merge.layer),
        "merge": MergeStage(transformer, merge),
        "back": BackStage(transformer, merge.layer),
    }
