"""What there is to say of a prompt that is merged at its prefill, before any step (--merge-at prefill).

B batch, G answer tokens, V visual tokens, K kept. Imports no framework but NumPy.
"""

from __future__ import annotations

import numpy as np

from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.loop.denoise import Floats, Ints, PromptMerge, uniform_selection_scores
from d3tom_export.merging.schedule import kept_at_prefill


def prompt_merge(
    merge: MergeConfig,
    generation: GenerationConfig,
    mask_token_id: int,
    *,
    batch: int,
    visual_tokens: int,
    logits: bool,
) -> PromptMerge | None:
    """What to ask of :meth:`~d3tom_export.loop.backend.Backend.start`; None where the prefill merges nothing.

    ``merge`` is what holds in the loop (:meth:`MergeConfig.in_loop`). ``logits`` tells whether steps will be asked for
    logits.
    """
    keep = kept_at_prefill(merge, visual_tokens)
    if keep is None:
        return None
    length, suffix = generation.gen_length, np.array(generation.suffix_ids, dtype=np.int64)
    row = np.concatenate([np.full(length, mask_token_id, dtype=np.int64), suffix])
    scores = None
    if merge.select == "uniform":
        scores = np.tile(uniform_selection_scores(visual_tokens, keep), (batch, 1))
    return PromptMerge(
        answer_ids=np.tile(row, (batch, 1)),
        deciders=np.tile(np.arange(len(row)) < length, (batch, 1)),
        keep=keep,
        logits=logits,
        selection_scores=scores,
    )


def best_of(scores: Floats, keep: int) -> Ints:
    """The ``keep`` best of ``scores`` (B, V), ascending, lower positions first among equals: (B, K) int64."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.sort(order[:, :keep], axis=1).astype(np.int64)
