"""The denoising loop: NumPy state, one step at a time, on any backend (lavida.md D; algorithm.md, "Denoising").

One loop serves every backend, so parity is a comparison of two backends and a benchmark a stopwatch on one.
B batch, P prompt tokens, G answer tokens, V visual tokens, K kept. Imports no framework but NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import CERTAINTIES, Certainty, GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.sampling import Choice, RowNoise, choose, commit
from d3tom_export.loop.step_plan import block_plan
from d3tom_export.merging.schedule import kept_tokens, merge_ratio

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
CacheMerge = Literal["anew", "if-changed", "held"]

_TOKEN_STREAM, _SELECTION_STREAM = 0, 1


@dataclass(frozen=True)
class StepRequest:
    """What the loop asks of a backend for one step."""

    answer_ids: Ints
    """(B, G), mask tokens included."""
    deciders: Bools
    """(B, G), the positions committed at the previous step."""
    merge: bool
    """Whether visual tokens merge at this step. They may with K = V, which keeps them all."""
    keep: int
    """K; equal to V when nothing merges."""
    cache_merge: CacheMerge
    """With a KV cache, where ``merge``: "anew", "if-changed" where the kept set is another than at the last merge, or
    "held", which takes the cache merged at an earlier step and its kept set."""
    last_merge: bool
    """With a KV cache: whether no later step of this answer merges anew, so that what only merging reads may go."""
    logits: bool
    """Whether the logits are wanted beside token and confidence."""
    selection_scores: Floats | None = None
    """(B, V), for the "random" and "uniform" policies."""
    certainty: Certainty | None = None
    """What positions are ranked by, where that is not the token's probability."""


@dataclass(frozen=True)
class StepResult:
    """What every backend answers, field for field."""

    token: Ints
    """(B, G), most likely token of each answer position."""
    confidence: NDArray[np.float64]
    """(B, G), its probability."""
    kept: Ints | None
    """(B, K) indices into the visual tokens, ascending; None when nothing merged."""
    logits: Floats | None = None
    """(B, G, rows of the head), where asked."""
    scores: Floats | None = None
    """(B, V) importance, from backends that can tell."""
    alternative_logits: tuple[Floats, ...] = ()
    """Each as ``logits``: had near-ties of the merge gone the other way, from the oracle where there were any."""
    vocab_rows: int | None = None
    """How many of the logits' columns, the first ones, are tokens that may be chosen; None: all."""
    certainty: NDArray[np.float64] | None = None
    """(B, G) margin or negative entropy, where asked: of all columns, as :mod:`~d3tom_export.loop.sampling` has it."""


class Session(Protocol):
    """One answer in progress on a backend, holding the prompt."""

    def step(self, request: StepRequest) -> StepResult: ...


@dataclass(frozen=True)
class StepRecord:
    """One step of a run, as it ended."""

    block: int
    step: int
    """t, counted within the block."""
    keep: int
    merged: bool
    tokens: Ints
    """(B, G) after committing."""
    transfer: Bools
    """(B, G) committed at this step: the deciders of the next."""
    result: StepResult


def uniform_selection_scores(visual_tokens: int, keep: int) -> Floats:
    """Scores (V,) that make the ``keep`` best an even stride over the visual tokens."""
    scores = np.zeros(visual_tokens, dtype=np.float32)
    scores[(np.arange(keep) * visual_tokens + visual_tokens // 2) // keep] = 1.0
    return scores


def _selection_scores(merge: MergeConfig, batch: int, visual_tokens: int, keep: int, noise: RowNoise) -> Floats | None:
    if merge.select == "random":
        return noise.uniform(visual_tokens).astype(np.float32)
    if merge.select == "uniform":
        return np.tile(uniform_selection_scores(visual_tokens, keep), (batch, 1))
    return None


def _checked(result: StepResult, request: StepRequest) -> StepResult:
    """Refuse a result that is not whole: parity and answers fail closed."""
    shape = request.answer_ids.shape
    problem = None
    if result.token.shape != shape or result.confidence.shape != shape:
        problem = f"token and confidence of shape {result.token.shape} and {result.confidence.shape} for {shape}"
    elif request.logits and (result.logits is None or result.logits.shape[:2] != shape):
        problem = "no logits of the answer's shape, though they were asked for"
    elif request.certainty and (result.certainty is None or result.certainty.shape != shape):
        problem = f"no {request.certainty} of the answer's shape, though it was asked for"
    elif request.certainty and not np.isfinite(result.certainty).all():  # type: ignore[arg-type]
        problem = f"a {request.certainty} that is not finite (NaN or infinite logits)"
    elif not np.isfinite(result.confidence).all():
        problem = "a confidence that is not finite (NaN or infinite logits)"
    if problem:
        raise D3tomError(
            f"A denoising step returned {problem}. Run `d3tom-export validate` on this bundle and backend; "
            "if PyTorch gives the same, the weights themselves overflow."
        )
    return result


def denoise(
    session: Session,
    *,
    batch: int,
    visual_tokens: int,
    mask_token_id: int,
    generation: GenerationConfig,
    merge: MergeConfig,
    logits: bool = False,
) -> Iterator[StepRecord]:
    """Denoise an answer step by step on ``session``; the last record's ``tokens`` are the answer.

    Blocks go left to right. Merging happens where there is a visual token and a decider, so never at the first step;
    the deciders carry over from one block to the next. ``logits`` asks for the logits of every step; sampling that
    needs them asks by itself.
    """
    shape = (batch, generation.gen_length)
    tokens = np.full(shape, mask_token_id, dtype=np.int64)
    deciders = np.zeros(shape, dtype=np.bool_)
    plan = block_plan(generation)
    token_noise = RowNoise(generation.seed, batch, _TOKEN_STREAM)
    certainty = next((kind for kind in CERTAINTIES if kind == generation.remasking), None)
    selection_noise = RowNoise(generation.seed, batch, _SELECTION_STREAM)

    blocks = generation.gen_length // generation.block
    per_block = merge.cache.remerge == "per-block"
    for block in range(blocks):
        held: int | None = None  # K of a merged cache that serves for the rest of the block
        in_reach = np.arange(generation.gen_length) < (block + 1) * generation.block
        for step, count in enumerate(plan):
            merged = merge.schedule != "none" and visual_tokens > 0 and bool(deciders.any())
            ratio = merge_ratio(merge, step, generation.steps_per_block) if merged else 0.0
            anew = kept_tokens(visual_tokens, ratio, merge.keep_multiple) if merged else visual_tokens
            keep = held if held is not None else anew
            request = StepRequest(
                answer_ids=tokens,
                deciders=deciders,
                merge=merged,
                keep=keep,
                cache_merge="if-changed" if merge.cache.remerge == "on-change" else "anew" if held is None else "held",
                last_merge=per_block and merged and block == blocks - 1,
                logits=logits or generation.temperature > 0,
                selection_scores=_selection_scores(merge, batch, visual_tokens, keep, selection_noise),
                certainty=certainty,
            )
            result = _checked(session.step(request), request)
            greedy = Choice(result.token, result.confidence)
            choice = choose(greedy, result.certainty, result.logits, generation, token_noise, result.vocab_rows)
            masked = tokens == mask_token_id
            transfer = commit(choice.confidence, masked & in_reach, int(count))
            tokens = np.where(transfer, choice.token, tokens)
            deciders = transfer
            if per_block and merged:
                held = keep
            yield StepRecord(block, step, keep, merged, tokens, transfer, result)
