"""The second half of a layer l* that merges: what both loops do alike once it is known which visual tokens stay.

B batch, L rows, V visual tokens, K kept, M = L - V + K, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d3tom_export.config import MergeConfig
from d3tom_export.model.llada import Transformer
from d3tom_export.stages.ops import RotaryStage, batch_rows, compact, merge_node, survivors


class ShorteningStage(RotaryStage):
    """A stage that holds layer l* and merges, or where it ``drops`` leaves out, visual tokens behind its attention."""

    def __init__(self, transformer: Transformer, merge: MergeConfig, *, drops: bool) -> None:
        super().__init__(transformer)
        self.block = transformer.blocks[merge.layer]
        self._aggregate, self._drops = merge.aggregate, drops

    def _merged_rows(self, hidden: Tensor, normed: Tensor, kept: Tensor) -> Tensor:
        """The kept visual tokens (B, K, D) out of ``hidden`` (B, V, D), with the others taken in or dropped."""
        if self._drops:
            return batch_rows(hidden, kept)
        if self._aggregate == "mean":
            merged, counts = merge_node([hidden, torch.ones_like(hidden[..., :1])], normed, kept)
            return merged / counts
        return merge_node([hidden], normed, kept)[0]

    def shorten(
        self, hidden: Tensor, normed: Tensor, attended: Tensor, visual_positions: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rows (B, M, D) that are left after l*, and their positions (B, M).

        ``hidden`` (B, L, D) is the layer's input, ``normed`` that after its first norm, ``attended`` what its attention
        adds; ``kept`` (B, K) are indices into ``visual_positions`` (V,).
        """
        batch, length, _ = hidden.shape
        visual, visual_normed = (rows.index_select(1, visual_positions) for rows in (hidden, normed))
        merged = self._merged_rows(visual, visual_normed, kept)

        # Survivors in order: text rows are read from `hidden`, kept visual rows from `merged` appended behind it.
        kept_positions = visual_positions[kept]
        sequence = torch.arange(length).expand(batch, length)
        survives = survivors(length, visual_positions, kept_positions)
        appended = (length + torch.arange(kept.shape[1])).expand(kept.shape)
        rows = sequence.scatter(1, kept_positions, appended)
        remaining = length - visual_positions.shape[0] + kept.shape[1]
        positions = compact(survives, sequence, remaining)
        residual = batch_rows(torch.cat([hidden, merged], dim=1), compact(survives, rows, remaining))
        return self.block.feed_forward(residual + batch_rows(attended, positions)), positions
