"""What the stages of both loops are made of: counting, gathering and the parts every graph shares.

The eager oracle selects with sorts and boolean masks; here everything is counting, gathering and scattering without a
reduction, so that ONNX Runtime and TensorRT both take the graph and break ties alike, towards the lower position.
B batch, L rows, V visual tokens, K kept, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3tom_export.config import LanguageConfig
from d3tom_export.merging.merge import merge_tokens, nearest_kept
from d3tom_export.model.llada import Rotary, Transformer, rotary_angles, rotary_frequencies


@torch.library.custom_op("d3tom_export::merge", mutates_args=())
def merge_node(rows: Sequence[Tensor], normed: Tensor, kept: Tensor) -> list[Tensor]:
    """The ``D3ToMMerge`` node (plugins/merge_op.py): ``rows``, each (B, V, W), (B, V, D), (B, K) -> each (B, K, W)."""
    nearest = nearest_kept(normed, kept)
    return [merge_tokens(hidden, normed, kept, nearest=nearest) for hidden in rows]


@merge_node.register_fake
def _(rows: Sequence[Tensor], normed: Tensor, kept: Tensor) -> list[Tensor]:
    return [hidden.new_empty(kept.shape[0], kept.shape[1], hidden.shape[2]) for hidden in rows]


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


def size_of(value: Tensor) -> int:
    """The integer in a tensor of shape (1,); symbolic while a graph is traced, so that it can be an axis."""
    return cast(int, value.item())


def kept_by(scores: Tensor, keep: Tensor) -> Tensor:
    """Ascending indices of the ``keep`` (1,) highest of ``scores`` (B, V), lower positions first: (B, K) int64."""
    batch, visual_tokens = scores.shape
    kept_tokens = size_of(keep)
    torch._check(kept_tokens >= 1)
    torch._check(kept_tokens <= visual_tokens)
    order = torch.arange(visual_tokens).expand(batch, visual_tokens)
    return compact(rank_scores(scores) < keep, order, kept_tokens)


def survivors(length: int, visual_positions: Tensor, kept_positions: Tensor) -> Tensor:
    """Which of ``length`` rows are text or kept, from ``visual_positions`` (V,) and (B, K) positions: (B, L) bool."""
    text = torch.ones(length, dtype=torch.int64).scatter(0, visual_positions, 0)
    return text.expand(kept_positions.shape[0], length).scatter(1, kept_positions, 1) > 0


class RotaryStage(nn.Module):
    """A stage whose blocks need rotary angles.

    The frequencies are a constant computed by torch. As part of the graph they would be folded by NumPy, whose power
    differs in the last bits (13 of 64 frequencies at LaViDa's geometry); at position 1000 that is 1e-4 rad.
    """

    frequencies: Tensor

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        config = transformer.config
        self.register_buffer("frequencies", rotary_frequencies(config.head_size, config.rope_theta), persistent=False)

    def angles_of(self, positions: Tensor) -> Rotary:
        """Angles of ``positions``, (L,) or (B, L) int64."""
        return rotary_angles(positions, self.frequencies)

    def angles(self, x: Tensor, positions: Tensor | None = None) -> Rotary:
        """Angles of ``positions`` (B, L), or of 0..L-1, for ``x`` (B, L, D)."""
        return self.angles_of(torch.arange(x.shape[1]) if positions is None else positions)


class Ban(nn.Module):
    """Logits (B, G, R) float32 with -infinity in the banned columns; themselves where there are none.

    A sum with a constant of R numbers, which every runtime does on its way past the logits.
    """

    offset: Tensor

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self._bans = bool(config.banned_token_ids)
        offset = torch.zeros(config.head_rows if self._bans else 0)
        offset[list(config.banned_token_ids)] = -torch.inf
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.offset if self._bans else logits


class Head(nn.Module):
    """Final norm, language head and greedy choice of the answer's rows (B, G, D).

    The choice is among the tokens that the embedding table has a row for and that are not banned; the softmax behind
    its confidence runs over all rows of the head but the banned ones. The logits are given out before the ban.
    """

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.ln_f, self.ff_out = transformer.ln_f, transformer.ff_out
        self._tokens, self._rows = transformer.config.vocab_rows, transformer.config.head_rows
        self.ban = Ban(transformer.config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = self.ff_out(self.ln_f(x)).float()
        allowed = self.ban(logits)
        tokens = allowed if self._tokens == self._rows else allowed[..., : self._tokens]
        token = tokens.argmax(dim=-1)
        # Relative to the chosen token, so that doubt, the others' sum, needs no division. A row without a token may be
        # the largest; one 88 larger makes the doubt infinite and the confidence 0.
        relative = torch.exp(allowed - tokens.amax(dim=-1, keepdim=True))
        doubt = relative.scatter(-1, token.unsqueeze(-1), 0.0).sum(dim=-1)
        return token, 1.0 / (1.0 + doubt), doubt, logits
