"""Steps with a kept set that is given: what a reference makes of the visual tokens that another runtime kept.

Which tokens are kept is decided by scores, and of two that differ by less than rounding does either may be. What
follows from them compares only where both sides have the same.

B batch, V visual tokens, K kept. Imports no framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from d3tom_export.loop.around import Around
from d3tom_export.loop.backend import Backend
from d3tom_export.loop.denoise import Floats, Ints, PromptMerge, Session, StepRecord, StepRequest, StepResult
from d3tom_export.parity.ties import NEAR_TIE, kept_gap

Restart = Callable[[Floats], Session]
"""Begins an answer once more with a prompt merged at its prefill by these scores (B, V)."""


def choosing(kept: Ints | None, result: StepResult) -> Floats | None:
    """Scores (B, V) by which ``kept`` are chosen; None where ``result`` kept them, or another number than those."""
    if result.kept is None or kept is None or kept.shape != result.kept.shape or result.scores is None:
        return None
    visual = result.scores.shape[1]
    if np.array_equal(kept, result.kept):
        return None
    if kept.dtype.kind != "i" or not ((kept >= 0) & (kept < visual)).all() or not (np.diff(kept) > 0).all():
        return None
    chosen = np.zeros_like(result.scores)
    np.put_along_axis(chosen, kept, 1.0, axis=1)
    return chosen


def step_with_kept(session: Session, request: StepRequest, result: StepResult, chosen: Floats) -> StepResult:
    """The step of ``result`` once more with the tokens that ``chosen`` scores; the scores stay those that decided."""
    return replace(session.step(replace(request, selection_scores=chosen)), scores=result.scores)


class Rescored:
    """A session of a prompt that was merged by scores made up for it: its results tell the real ones (B, V)."""

    def __init__(self, session: Session, scores: Floats | None) -> None:
        self._session, self._scores = session, scores
        self.first_token = session.first_token

    def step(self, request: StepRequest) -> StepResult:
        return replace(self._session.step(request), scores=self._scores)


class Following(Around):
    """A reference that goes along where a run kept another visual token whose score was as good.

    Its answer to the same prompt then compares with that run to the last digit. ``kept`` are the run's, step by step;
    ``turned`` counts the steps at which it went along.
    """

    def __init__(self, reference: Backend, kept: Sequence[Ints | None]) -> None:
        super().__init__(reference)
        self._kept = kept
        self.turned = 0

    def start(
        self,
        prompt_embeddings: Floats,
        visual_positions: Ints,
        *,
        merges: bool = True,
        prompt_merge: PromptMerge | None = None,
        shared_rows: int = 0,
    ) -> Session:
        def begin(scores: Floats | None = None) -> Session:
            asked = prompt_merge
            if asked is not None and scores is not None:
                asked = replace(asked, selection_scores=scores)
            return self._backend.start(
                prompt_embeddings, visual_positions, merges=merges, prompt_merge=asked, shared_rows=shared_rows
            )

        return _FollowingSession(self, begin(), self._kept, None if prompt_merge is None else begin)


class _FollowingSession:
    def __init__(
        self, owner: Following, session: Session, kept: Sequence[Ints | None], restart: Restart | None
    ) -> None:
        self._owner, self._session, self._kept, self._restart = owner, session, iter(kept), restart
        self.first_token = session.first_token

    def step(self, request: StepRequest) -> StepResult:
        result, theirs = self._session.step(request), next(self._kept, None)
        chosen = choosing(theirs, result)
        if chosen is None or not _near(theirs, result):
            return result
        if self._restart is not None:
            self._session = Rescored(self._restart(chosen), result.scores)
            self._restart = None  # what the prefill kept holds for all steps
            self._owner.turned += 1
            return self._session.step(request)
        if request.cache_merge == "held":
            return result
        self._owner.turned += 1
        return step_with_kept(self._session, request, result, chosen)


def _near(kept: Ints | None, result: StepResult) -> bool:
    """Whether ``kept`` (B, K) differ from the result's, where they do, by near-ties alone."""
    assert kept is not None
    assert result.kept is not None
    assert result.scores is not None
    rows = zip(kept, result.kept, result.scores, strict=True)
    return all(np.array_equal(a, b) or kept_gap(a, b, scores) <= NEAR_TIE for a, b, scores in rows)


def gone_along(
    oracle: Backend,
    reference: list[StepRecord],
    records: Sequence[StepRecord],
    run: Callable[[Backend], Iterable[StepRecord]],
) -> tuple[list[StepRecord], int]:
    """``reference``, or if ``records`` kept other tokens somewhere what the oracle's ``run`` gives where it goes along.

    It does where that was a near-tie (:class:`Following`); returns at how many steps, too.
    """
    theirs = [record.result.kept for record in records]
    ours = [record.result.kept for record in reference]
    if all(a is None or b is None or np.array_equal(a, b) for a, b in zip(ours, theirs, strict=False)):
        return reference, 0
    following = Following(oracle, theirs)
    followed = list(run(following))
    return (followed, following.turned) if following.turned else (reference, 0)
