"""The denoising loop for a prompt on a backend."""

from __future__ import annotations

from collections.abc import Iterator

from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import StepRecord, denoise


def run_loop(
    backend: Backend,
    prompt: Prompt,
    mask_token_id: int,
    generation: GenerationConfig,
    merge: MergeConfig,
    *,
    logits: bool = False,
) -> Iterator[StepRecord]:
    """The denoising loop (:func:`d3tom_export.loop.denoise.denoise`) for ``prompt`` on ``backend``.

    Of ``merge``, what holds in the backend's kind of loop (:meth:`MergeConfig.in_loop`).
    """
    merge = merge.in_loop(backend.kv_cache)
    visual_tokens = len(prompt.visual_positions)
    merges = merge.schedule != "none" and visual_tokens > 0
    return denoise(
        backend.start(prompt.embeddings, prompt.visual_positions, merges=merges),
        batch=len(prompt.embeddings),
        visual_tokens=visual_tokens,
        mask_token_id=mask_token_id,
        generation=generation,
        merge=merge,
        logits=logits,
    )
