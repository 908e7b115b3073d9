"""One question on one picture through the package's own forward passes, merged in each of the ways of inference."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from d3tom_export.config import MergeConfig
from d3tom_export.merging.cached import forward_cached, prefill, prefill_merged, score_prompt
from d3tom_export.merging.forward import ForwardResult, Merging, forward
from d3tom_export.model.lavida import Lavida

Loop = Literal["full", "cached", "prefill"]
"""Attention over the whole sequence; the prompt's cached keys and values; those of a prompt merged at its prefill."""


def answer_question(
    model: Lavida,
    prompt: Tensor,
    visual_positions: Tensor,
    answer_ids: Tensor,
    loop: Loop,
    merging: tuple[MergeConfig, int, Tensor, Tensor | None] | None,
) -> ForwardResult:
    """Logits (1, G, vocabulary) of one step on the embedded ``prompt`` (1, P, D) and ``answer_ids`` (1, G).

    ``merging`` is the configuration, K, the deciders (1, G) bool and scores (1, V) from outside, if any.
    """
    transformer = model.transformer
    answer = model.embed_tokens(answer_ids)
    merge = None
    if merging is not None:
        config, keep, deciders, scores = merging
        merge = Merging(config, deciders, visual_positions, keep, scores)
    if loop == "full":
        return forward(transformer, torch.cat([prompt, answer], dim=1), answer_ids.shape[1], merge)
    if loop == "cached" or merge is None:
        return forward_cached(transformer, prefill(transformer, prompt).cache, answer, merge)[0]
    scored = score_prompt(transformer, prompt, answer, merge)
    held = prefill_merged(transformer, scored).merged
    return forward_cached(transformer, scored.cache, answer, held=held)[0]
