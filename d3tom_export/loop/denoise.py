"""The denoising loop: NumPy state, one step at a time, on any backend (lavida.md D; algorithm.md, "Denoising").

One loop serves every backend, so parity is a comparison of two backends and a benchmark a stopwatch on one.
B batch, P prompt tokens, G answer tokens, V visual tokens, K kept. Imports no framework but NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import Certainty, Choices, GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.commit_rules import decide
from d3tom_export.loop.ends import EndTokens, Stops
from d3tom_export.loop.sampling import Choice, RowNoise, choose
from d3tom_export.loop.step_plan import block_plan
from d3tom_export.merging.schedule import kept_tokens, merge_ratio

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
CacheMerge = Literal["anew", "if-changed", "held"]

_TOKEN_STREAM, _SELECTION_STREAM = 0, 1


@dataclass(frozen=True)
class PromptMerge:
    """What the loop with a KV cache asks of a backend where the prompt is merged once, at its prefill.

    Every step of the answer then takes the merged cache, and its kept set, as one "held".
    """

    answer_ids: Ints
    """(B, G), the answer as it starts, all mask tokens, and a suffix behind it: G here counts that too."""
    deciders: Bools
    """(B, G), the mask tokens: their attention at l* scores the visual tokens."""
    keep: int
    """K, 1..V. With K = V nothing is merged."""
    logits: bool
    """Whether steps will be asked for logits, which near-ties of this merge may change."""
    selection_scores: Floats | None = None
    """(B, V), for the "uniform" policy: then nobody's attention is asked."""


@dataclass(frozen=True)
class StepRequest:
    """What the loop asks of a backend for one step."""

    answer_ids: Ints
    """(B, G), mask tokens included, and a suffix behind the answer: G here counts that too."""
    deciders: Bools
    """(B, G), the positions committed at the last step that committed any, or those of them that look
    (:attr:`~d3tom_export.config.MergeConfig.deciders`)."""
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
    """What positions are ranked by, where that is not the token's probability among all."""


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
    choices: Choices | None = None
    """Which of the logits' columns are tokens that may be chosen; None: all."""
    certainty: NDArray[np.float64] | None = None
    """(B, G), where asked, as :mod:`~d3tom_export.loop.sampling` has it."""


class Session(Protocol):
    """One answer in progress on a backend, holding the prompt."""

    first_token: Ints | None
    """(B,) the answer's first token, where the prompt's last row predicts it and no step's rows do: with a KV cache, of
    models with a row shift. None: every token is a step's."""

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
    """(B, G) committed at this step: the deciders of the next, unless there are none or only some look."""
    end: Ints
    """(B,) where each answer ends: at the start of its first stop sequence so far, or at G."""
    result: StepResult
    slack: NDArray[np.float64] | None = None
    """(B, G), as :class:`~d3tom_export.loop.commit_rules.Committed` has it."""
    filled: Bools | None = None
    """(B, G), which of ``transfer`` were filled in behind an end token, where the settings ask for that."""
    working: Bools | None = None
    """(B,) which answers this step was run for: the others had ended, or waited for the next block, and would not have
    had it alone. None: it was run for all."""


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
        problem = f"no {request.certainty.kind} of the answer's shape, though it was asked for"
    elif request.certainty and not np.isfinite(result.certainty).all():  # type: ignore[arg-type]
        problem = f"a {request.certainty.kind} that is not finite (NaN or infinite logits)"
    elif not np.isfinite(result.confidence).all():
        problem = "a confidence that is not finite (NaN or infinite logits)"
    if problem:
        raise D3tomError(
            f"A denoising step returned {problem}. Run `d3tom-export validate` on this bundle and backend; "
            "if PyTorch gives the same, the weights themselves overflow."
        )
    return result


def of_answer(result: StepResult, length: int) -> StepResult:
    """``result`` without the rows of a suffix behind the answer."""
    if result.token.shape[1] == length:
        return result
    return replace(
        result,
        token=result.token[:, :length],
        confidence=result.confidence[:, :length],
        logits=None if result.logits is None else result.logits[:, :length],
        alternative_logits=tuple(logits[:, :length] for logits in result.alternative_logits),
        certainty=None if result.certainty is None else result.certainty[:, :length],
    )


def _steps_of_block(generation: GenerationConfig, masks: Ints) -> Iterator[Ints | None]:
    """How many tokens (B,) each step of a block commits, whose rows have so many ``masks`` (B,); at least one step.

    None where a rule finds out; of as many steps as ``max_steps`` allows the last commits all that is left.
    """
    if not generation.planned:
        most = max(1, int(masks.max()))
        for step in range(min(most, generation.max_steps or most)):
            yield masks if step + 1 == generation.max_steps else None
        return
    plans = [block_plan(generation, int(count)) for count in masks]
    padded = np.zeros((max(1, *map(len, plans)), len(plans)), dtype=np.int64)
    for row, plan in enumerate(plans):
        padded[: len(plan), row] = plan
    yield from padded


def _ratio(merge: MergeConfig, generation: GenerationConfig, step: int, masked: Bools) -> float:
    """alpha_t at ``step`` of a block, whose rows still have the masks ``masked`` (B, block) to be filled.

    Its clock is the plan's step; under a rule, whose steps nobody knows beforehand, the share of the block that is
    committed: of the row that is furthest of those at work, so that none sees fewer visual tokens than alone. At one
    token a step the two are the same number.
    """
    if generation.planned:
        return merge_ratio(merge, step, generation.steps_per_block)
    left = masked.sum(axis=1)
    least = int(left[left > 0].min(initial=generation.block))
    return merge_ratio(merge, generation.block - least, generation.block)


def denoise(
    session: Session,
    *,
    batch: int,
    visual_tokens: int,
    mask_token_id: int,
    generation: GenerationConfig,
    merge: MergeConfig,
    logits: bool = False,
    seeds: Sequence[int] | None = None,
) -> Iterator[StepRecord]:
    """Denoise an answer step by step on ``session``; the last record's ``tokens``, up to its ``end``, are the answer.

    Blocks go left to right; one is left where no row has a mask in it, and the answer where every row has all that
    stands before a stop sequence. Merging happens where there is a visual token and a decider, so never at the first
    step; the deciders carry over from one block to the next, and over steps that commit nothing. Where the prompt was
    merged at its prefill (:class:`PromptMerge`), every step holds that merge. An early exit leaves the answer where no
    row's text can change any more; up to there nothing differs, in a batch either. ``logits`` asks for the logits of
    every step; sampling that needs them asks by itself. ``seeds`` has one for each row's noise; None: those that follow
    from ``generation.seed``.
    """
    length = generation.gen_length
    tokens = np.full((batch, length), mask_token_id, dtype=np.int64)
    if session.first_token is not None:
        tokens[:, 0] = session.first_token
    suffix = np.tile(np.array(generation.suffix_ids, dtype=np.int64), (batch, 1))
    deciders = np.zeros((batch, length), dtype=np.bool_)
    stops, done = Stops(generation.stop_ids, batch, length), np.zeros(batch, dtype=np.bool_)
    ends = EndTokens(generation.end_ids, mask_token_id)
    of_rows = range(generation.seed, generation.seed + batch) if seeds is None else seeds
    token_noise, selection_noise = RowNoise(of_rows, _TOKEN_STREAM), RowNoise(of_rows, _SELECTION_STREAM)
    sampled, ran = generation.temperature > 0, False
    places = np.arange(length)

    per_block, at_prefill = merge.cache.remerge == "per-block", merge.merge_at == "prefill"
    for block in range(generation.blocks):
        held: int | None = None  # K of a merged cache that serves for the rest of the block
        start, stop = block * generation.block, (block + 1) * generation.block
        done |= stops.end <= start
        masks = (tokens[:, start:stop] == mask_token_id).sum(axis=1)
        for step, counts in enumerate(_steps_of_block(generation, masks)):
            masked = tokens == mask_token_id
            done |= stops.reached & ~(masked & (places < stops.end[:, None])).any(axis=1)
            ended = done | ends.settled(tokens, stops) if generation.early_exit and ran else done
            if ended.all():
                return
            at_work = (masked & ~done[:, None])[:, start:stop]
            # An answer that the prompt fills has a step too.
            if not at_work.any() and (ran or block + 1 < generation.blocks):
                break
            working = ~ended & (at_work.any(axis=1) | (not ran))
            merged = merge.schedule != "none" and visual_tokens > 0 and (at_prefill or bool(deciders.any()))
            ratio = _ratio(merge, generation, step, at_work) if merged else 0.0
            anew = kept_tokens(visual_tokens, ratio, merge.keep_multiple) if merged else visual_tokens
            keep = held if held is not None else anew
            rhythm: CacheMerge = "if-changed" if merge.cache.remerge == "on-change" else "anew"
            request = StepRequest(
                answer_ids=np.concatenate([tokens, suffix], axis=1),
                deciders=np.concatenate([deciders, np.zeros(suffix.shape, dtype=np.bool_)], axis=1),
                merge=merged,
                keep=keep,
                cache_merge="held" if at_prefill or held is not None else rhythm,
                last_merge=per_block and merged and block == generation.blocks - 1,
                logits=logits or sampled,
                selection_scores=_selection_scores(merge, batch, visual_tokens, keep, selection_noise),
                certainty=None if sampled and generation.rank_drawn else generation.certainty,
            )
            result = of_answer(_checked(session.step(request), request), length)
            greedy = Choice(result.token, result.confidence)
            choice = choose(greedy, result.certainty, result.logits, generation, token_noise, result.choices)
            # A stop takes the place of the block's end, as in the original: what lies before it is still filled.
            limit = np.where(stops.reached, stops.end, stop)[:, None]
            eligible = masked & (places < limit) & ~done[:, None]
            transfer, slack = decide(generation, choice.confidence, eligible, counts)
            tokens = np.where(transfer, choice.token, tokens)
            stops.look(tokens)
            filled: Bools | None = None
            if generation.fill_after_end:
                tokens, filled = ends.fill(tokens, stops)
                transfer = transfer | filled
            deciding = ends.looking(tokens, transfer) if merge.deciders == "looking" else transfer
            deciders = np.where(transfer.any(axis=1, keepdims=True), deciding, deciders)
            if per_block and merged:
                held = keep
            ran = True
            end = stops.end.copy()
            yield StepRecord(block, step, keep, merged, tokens, transfer, end, result, slack, filled, working)
