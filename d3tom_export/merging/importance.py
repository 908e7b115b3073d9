"""Importance of visual tokens: what the decider tokens attend to (paper section on decider-guided merging).

B batch, H heads, S query rows, L keys, V visual tokens, K kept, G answer tokens, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d3tom_export.config import SelectionPolicy


def attention_rows(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention probabilities of some rows, averaged over heads: (B, S, L) float32.

    ``queries`` (B, H, S, d) and ``keys`` (B, H, L, d) carry their rotary embedding. The softmax runs over all L keys
    and in float32 whatever the dtype: in bfloat16 about a hundred distinct scores are left for a thousand tokens.
    """
    scale = queries.shape[-1] ** -0.5
    return torch.softmax(queries.float() @ keys.float().transpose(-1, -2) * scale, dim=-1).mean(dim=1)


def decider_importance(rows: Tensor, deciders: Tensor) -> Tensor:
    """Sum of the decider rows: ``rows`` (B, G, L) of the answer tokens, ``deciders`` (B, G) bool -> (B, L)."""
    return (rows * deciders.unsqueeze(-1).to(rows.dtype)).sum(dim=1)


def visual_scores(
    policy: SelectionPolicy, queries: Tensor, keys: Tensor, deciders: Tensor, visual_positions: Tensor
) -> Tensor:
    """Scores of the visual tokens under an attention-based policy: (B, V) float32.

    ``queries`` (B, H, S, d) end with the G answer rows, ``keys`` are (B, H, L, d). "decider" sums the rows of the
    decider tokens; "fastv" takes the row of the last prompt token (FastV, arXiv 2403.06764).
    """
    answer_tokens = deciders.shape[1]
    if policy == "fastv":
        last_prompt = queries.shape[2] - answer_tokens - 1
        scores = attention_rows(queries[:, :, last_prompt : last_prompt + 1], keys)[:, 0]
    else:
        first_answer = queries.shape[2] - answer_tokens
        scores = decider_importance(attention_rows(queries[:, :, first_answer:], keys), deciders)
    return scores.index_select(1, visual_positions)


def most_important(scores: Tensor, keep: int) -> Tensor:
    """The ``keep`` best of ``scores`` (B, V), in ascending order of position: (B, K) int64.

    Ties go to the lower position; a stable sort guarantees it where ``torch.topk`` does not.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[:, :keep].sort(dim=-1).values
