"""A backend whose answers are watched: what each step was asked, how long it took, and in which stages.

Imports no framework but NumPy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from d3tom_export.loop.around import Around
from d3tom_export.loop.backend import Backend, StageClock
from d3tom_export.loop.denoise import Floats, Ints, PromptMerge, Session, StepRequest, StepResult


@dataclass
class Watched:
    """One answer as its session was asked for it."""

    start: dict[str, Any] = field(default_factory=dict)
    """What :meth:`Backend.start` was called with."""
    requests: list[StepRequest] = field(default_factory=list)
    start_seconds: float = 0.0
    start_stages: dict[str, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    step_stages: list[dict[str, float]] = field(default_factory=list)


class _Session:
    """``session``, whose steps are watched."""

    def __init__(self, session: Session, measure: Callable[..., Any], watched: Watched) -> None:
        self.first_token = session.first_token
        self._session, self._measure, self._watched = session, measure, watched

    def step(self, request: StepRequest) -> StepResult:
        result, seconds, stages = self._measure(self._session.step, request)
        self._watched.requests.append(request)
        self._watched.step_seconds.append(seconds)
        self._watched.step_stages.append(stages)
        result_of_step: StepResult = result
        return result_of_step


class WatchingBackend(Around):
    """``backend``, whose last answer is :attr:`watched`. Made for one answer after another, not for several at once."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.watched = Watched()

    def measure(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Any, float, dict[str, float]]:
        """What ``call`` returns, the seconds that it took, and those of each stage that ran meanwhile."""
        before = self._stages()
        started = time.perf_counter()
        result = call(*arguments, **named)
        seconds = time.perf_counter() - started
        after = self._stages()
        return result, seconds, {name: spent for name in after if (spent := after[name] - before.get(name, 0.0)) > 0}

    def _stages(self) -> dict[str, float]:
        return self._backend.stage_seconds() if isinstance(self._backend, StageClock) else {}

    def start(
        self,
        prompt_embeddings: Floats,
        visual_positions: Ints,
        *,
        merges: bool = True,
        prompt_merge: PromptMerge | None = None,
        shared_rows: int = 0,
    ) -> Session:
        self.watched = watched = Watched(
            {
                "prompt_embeddings": prompt_embeddings,
                "visual_positions": visual_positions,
                "merges": merges,
                "prompt_merge": prompt_merge,
                "shared_rows": shared_rows,
            }
        )
        session, watched.start_seconds, watched.start_stages = self.measure(self._backend.start, **watched.start)
        return _Session(session, self.measure, watched)
