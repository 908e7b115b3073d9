"""The model cut at l* into modules whose graphs have no data-dependent shape.

The eager oracle selects with sorts and boolean masks; here everything is counting, gathering and scattering without a
reduction, so that ONNX Runtime and TensorRT both take the graph and break ties alike, towards the lower position.
B batch, P prompt, G answer tokens, L = P + G, V visual tokens, K kept, M = L - V + K, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3tom_export.config import MergeConfig
from d3tom_export.merging.importance import visual_scores
from d3tom_export.merging.merge import merge_tokens
from d3tom_export.model.lavida import Lavida
from d3tom_export.model.llada import LladaBlock, Rotary, Transformer, rotary_angles, rotary_frequencies, rotate


@torch.library.custom_op("d3tom_export::merge", mutates_args=())
def merge_node(hidden: Tensor, normed: Tensor, kept: Tensor) -> Tensor:
    """The ``D3ToMMerge`` node (plugins/merge_op.py): (B, V, W), (B, V, D), (B, K) -> (B, K, W)."""
    return merge_tokens(hidden, normed, kept)


@merge_node.register_fake
def _(hidden: Tensor, normed: Tensor, kept: Tensor) -> Tensor:
    return hidden.new_empty(kept.shape[0], kept.shape[1], hidden.shape[2])


def batch_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) of ``x`` (B, L, D) as one plain Gather over the flattened rows: (B, K, D)."""
    starts = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return F.embedding(index + starts, x.flatten(0, 1))


def rank_scores(scores: Tensor) -> Tensor:
    """Rank of each of ``scores`` (B, V), 0 for the highest; ties rank by position: (B, V) int64.

    By counting instead of TopK: TensorRT leaves TopK's ties open and limits it to 3840 entries.
    """
    position = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores.unsqueeze(2), scores.unsqueeze(1)
    ahead = (other > mine) | ((other == mine) & (position < position.unsqueeze(1)))
    return ahead.to(torch.int64).sum(dim=2)


def compact(selected: Tensor, values: Tensor, count: int) -> Tensor:
    """The ``values`` (B, L) at the ``count`` True places of each row of ``selected`` (B, L), in order: (B, count).

    Every place is written to its slot; places that are not selected share one slot past the end, which is cut off.
    """
    running = torch.cumsum(selected.to(torch.int64), dim=1)
    slot = torch.where(selected, running - 1, torch.full_like(running, count))
    return torch.zeros(values.shape[0], count + 1, dtype=values.dtype).scatter(1, slot, values)[:, :count]


def _size(value: Tensor) -> int:
    """The integer in a tensor of shape (1,); symbolic while a graph is traced, so that it can be an axis."""
    return cast(int, value.item())


def _run_blocks(blocks: Sequence[LladaBlock], x: Tensor, rotary: Rotary) -> Tensor:
    for block in blocks:
        x = block(x, rotary)
    return x


class _RotaryStage(nn.Module):
    """A stage whose blocks need rotary angles.

    The frequencies are a constant computed by torch. As part of the graph they would be folded by NumPy, whose power
    differs in the last bits (13 of 64 frequencies at LaViDa's geometry); at position 1000 that is 1e-4 rad.
    """

    frequencies: Tensor

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        config = transformer.config
        self.register_buffer("frequencies", rotary_frequencies(config.head_size, config.rope_theta), persistent=False)

    def angles(self, x: Tensor, positions: Tensor | None = None) -> Rotary:
        """Angles of ``positions`` (B, L), or of 0..L-1, for ``x`` (B, L, D)."""
        return rotary_angles(torch.arange(x.shape[1]) if positions is None else positions, self.frequencies)


class EmbedStage(nn.Module):
    """Token ids (B, S) -> embeddings (B, S, D). The only stage that holds the embedding table."""

    def __init__(self, model: Lavida) -> None:
        super().__init__()
        self.wte = model.transformer.wte

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.wte(token_ids)


class VisionStage(nn.Module):
    """Views (W, 3, S, S) -> pooled, projected features (W, T, D)."""

    def __init__(self, model: Lavida) -> None:
        super().__init__()
        self.lavida = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.lavida.encode_views(pixel_values)


class FrontStage(_RotaryStage):
    """Prompt and answer embeddings -> the residual stream after layers 0..l*-1."""

    def __init__(self, transformer: Transformer, layer: int) -> None:
        super().__init__(transformer)
        self.blocks = transformer.blocks[:layer]

    def forward(self, prompt_embeddings: Tensor, answer_embeddings: Tensor) -> Tensor:
        hidden = torch.cat([prompt_embeddings, answer_embeddings], dim=1)
        return _run_blocks(self.blocks, hidden, self.angles(hidden)) if len(self.blocks) else hidden


class MergeStage(_RotaryStage):
    """Layer l*: attention unmerged, visual tokens merged, feed-forward on the short sequence."""

    def __init__(self, transformer: Transformer, merge: MergeConfig) -> None:
        super().__init__(transformer)
        self.block = transformer.blocks[merge.layer]
        self._merge = merge

    def _merged_rows(self, hidden: Tensor, normed: Tensor, kept: Tensor) -> Tensor:
        """The kept visual tokens (B, K, D) out of ``hidden`` (B, V, D), with the others taken in or dropped."""
        if self._merge.select != "decider":
            return batch_rows(hidden, kept)
        merged = merge_node(hidden, normed, kept)
        if self._merge.aggregate == "mean":
            merged = merged / merge_node(torch.ones_like(hidden[..., :1]), normed, kept)
        return merged

    def forward(
        self,
        hidden: Tensor,
        deciders: Tensor,
        visual_positions: Tensor,
        keep: Tensor,
        selection_scores: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        batch, length, _ = hidden.shape
        visual_tokens = visual_positions.shape[0]
        kept_tokens = _size(keep)
        torch._check(kept_tokens >= 1)
        torch._check(kept_tokens <= visual_tokens)

        rotary = self.angles(hidden)
        normed = self.block.attn_norm(hidden)
        heads = self.block.project(normed)
        queries, keys = rotate(heads.queries, rotary), rotate(heads.keys, rotary)
        attended = self.block.attend(queries, keys, heads.values)

        scores = selection_scores
        if scores is None:
            scores = visual_scores(self._merge.select, queries, self.block.repeat_kv(keys), deciders, visual_positions)
        order = torch.arange(visual_tokens).expand(batch, visual_tokens)
        kept = compact(rank_scores(scores) < keep, order, kept_tokens)
        merged = self._merged_rows(hidden[:, visual_positions], normed[:, visual_positions], kept)

        # Survivors in order: text rows are read from `hidden`, kept visual rows from `merged` appended behind it.
        kept_positions = visual_positions[kept]
        sequence = torch.arange(length).expand(batch, length)
        survives = torch.ones(length, dtype=torch.int64).scatter(0, visual_positions, 0).expand(batch, length)
        survives = survives.scatter(1, kept_positions, 1) > 0
        appended = (length + torch.arange(kept_tokens)).expand(batch, kept_tokens)
        rows = sequence.scatter(1, kept_positions, appended)
        remaining = length - visual_tokens + kept_tokens
        positions = compact(survives, sequence, remaining)
        residual = batch_rows(torch.cat([hidden, merged], dim=1), compact(survives, rows, remaining))
        x = self.block.feed_forward(residual + batch_rows(attended, positions))
        return (x, kept, positions) if self._merge.positions == "original" else (x, kept)


class BackStage(_RotaryStage):
    """Layers l*+1..N-1, final norm and language head on the answer's rows, greedy choice."""

    def __init__(self, transformer: Transformer, merge: MergeConfig) -> None:
        super().__init__(transformer)
        self.blocks = transformer.blocks[merge.layer + 1 :]
        self.ln_f, self.ff_out = transformer.ln_f, transformer.ff_out

    def forward(self, merged: Tensor, answer_length: Tensor, positions: Tensor | None = None) -> tuple[Tensor, ...]:
        if len(self.blocks):
            merged = _run_blocks(self.blocks, merged, self.angles(merged, positions))
        answer_tokens = _size(answer_length)
        torch._check(answer_tokens >= 1)
        torch._check(answer_tokens <= merged.shape[1])
        rows = torch.arange(answer_tokens) + (merged.shape[1] - answer_tokens)
        logits = self.ff_out(self.ln_f(merged.index_select(1, rows))).float()

        token = logits.argmax(dim=-1)
        relative = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
        doubt = relative.scatter(-1, token.unsqueeze(-1), 0.0).sum(dim=-1)
        return token, 1.0 / (1.0 + doubt), doubt, logits


def stage_modules(model: Lavida, merge: MergeConfig) -> dict[str, nn.Module]:
    """The stages of an uncached run by name; they share their parameters with ``model``."""
    transformer = model.transformer
    stages: dict[str, nn.Module] = {} if model.config.vision is None else {"vision": VisionStage(model)}
    return stages | {
        "embed": EmbedStage(model),
        "front": FrontStage(transformer, merge.layer),
        "merge": MergeStage(transformer, merge),
        "back": BackStage(transformer, merge),
    }
