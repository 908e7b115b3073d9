"""Requests answered by open models, in the order in which they came: a queue, and a thread for each model.

A model's runtime works for one answer at a time, and engines are bound to the thread that opened them: so a model is
opened, asked and closed in a thread of its own. Nothing here knows of HTTP.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from d3tom_export.api.answers import Answer, Description, Request, Step
from d3tom_export.api.model import Model
from d3tom_export.api.pictures import Pictures
from d3tom_export.errors import D3tomError, SizeError

_LOG = logging.getLogger(__name__)

Event = Step | Answer | Exception
"""What becomes of a request: steps where they are wanted, then an answer or why there is none."""


@dataclass(eq=False)
class Work:
    """One request.

    Args:
        pictures: Cut for the model's tower; gone once a model has them.
        question: Messages.
        settings: Of the answer.
        steps: Whether each step is told; else only the answer.
        tell: Called with each :data:`Event`, in a model's thread; an error of it fails the request.
        ended: Called once, in some thread, when it is over: answered, failed or given up.
    """

    pictures: Pictures | None
    question: list[dict[str, str]]
    settings: Mapping[str, Any]
    steps: bool
    tell: Callable[[Event], None]
    ended: Callable[[], None]
    given_up: bool = False
    came: float = field(default_factory=time.monotonic)

    def take_pictures(self) -> Pictures | None:
        """Its pictures, of which nothing is kept: once they are embedded, nobody needs them."""
        found, self.pictures = self.pictures, None
        return found


class Answering:
    """Models that answer requests; :meth:`start` opens them.

    Args:
        opener: Opens a model; called in each model's thread.
        models: How many.
        batch: Answers at once, of requests whose steps are not told.
        waited: Called with the seconds that each request waited.
        opened: Called when a model is open, in its thread.
        failed: Called with the error of a model that cannot be opened, or of ``opened``.
    """

    def __init__(
        self,
        opener: Callable[[], Model],
        *,
        models: int = 1,
        batch: int = 1,
        waited: Callable[[float], None] = lambda _: None,
        opened: Callable[[Description], None] = lambda _: None,
        failed: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self._opener, self._batch = opener, batch
        self._waited, self._opened, self._failed = waited, opened, failed
        self._queue: deque[Work] = deque()
        self._changed = threading.Condition()
        self._ends = False
        self._running = self._open = 0
        self._failure: Exception | None = None
        self.seconds = 1.0
        """That an answer takes, of late."""
        self.threads = [threading.Thread(target=self._live, name=f"d3tom-model-{n}") for n in range(models)]
        for thread in self.threads:
            thread.daemon = True  # a process that is told to end at once does not wait for an answer

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def wait(self) -> None:
        """Until all models are open. Raises the error of one that cannot be opened."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._open == len(self.threads))
            if self._failure is not None:
                raise self._failure

    def end(self) -> None:
        """Answer what waits, then close the models: :attr:`lives` tells when that is done."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()

    def stop(self, seconds: float | None = None) -> bool:
        """As :meth:`end`, and wait for that, up to so many seconds. Whether it is done."""
        self.end()
        until = math.inf if seconds is None else time.monotonic() + seconds
        for thread in self.threads:
            if thread.ident is not None:
                thread.join(None if seconds is None else max(0.0, until - time.monotonic()))
        return not self.lives

    @property
    def lives(self) -> bool:
        """Whether some model is open, or being opened."""
        return any(thread.is_alive() for thread in self.threads)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return self._running

    @property
    def open(self) -> int:
        """Models that are."""
        return self._open

    def submit(self, work: Work) -> None:
        """Have it answered, behind those that came before."""
        with self._changed:
            self._queue.append(work)
            self._changed.notify()

    def give_up(self, work: Work) -> None:
        """Nobody wants the answer any more: it is not begun, or ends with the step at hand (with others of a batch)."""
        with self._changed:
            work.given_up = True
            if work not in self._queue:
                return
            self._queue.remove(work)
        work.ended()

    def _live(self) -> None:
        """A thread's life."""
        with ExitStack() as held:
            try:
                model = held.enter_context(self._opener())
                model.load()
                self._opened(model.describe())
            except Exception as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                self._failed(error)
                return
            self._count(open=1)
            while works := self._take():
                started = time.monotonic()
                for work in works:
                    self._waited(started - work.came)
                try:
                    self._answer(model, works)
                finally:
                    self._count(running=-len(works))
                    self.seconds += 0.2 * ((time.monotonic() - started) / len(works) - self.seconds)
                    for work in works:
                        work.ended()
            self._count(open=-1)

    def _count(self, *, running: int = 0, open: int = 0) -> None:
        with self._changed:
            self._running += running
            self._open += open
            self._changed.notify_all()

    def _take(self) -> list[Work]:
        """The next request; with those behind it that may be asked together. Empty: there will be none."""
        with self._changed:
            while not self._queue:
                if self._ends:
                    return []
                self._changed.wait()
            works = [self._queue.popleft()]
            if not works[0].steps:
                works += [work for work in self._queue if not work.steps][: self._batch - 1]
                for work in works[1:]:
                    self._queue.remove(work)
            self._running += len(works)
            return works

    def _answer(self, model: Model, works: Sequence[Work]) -> None:
        try:
            if len(works) > 1:
                requests = [Request(work.take_pictures(), work.question, **work.settings) for work in works]
                for work, found in zip(works, model.answer_many(requests, batch=self._batch), strict=True):
                    if isinstance(found, Answer):
                        work.tell(found)
                    else:
                        cause = found.__cause__
                        _fail(work, cause if isinstance(cause, Exception) else found)
            else:
                _answer_alone(model, works[0])
        except Exception as error:
            for work in works:
                _fail(work, error)


def _fail(work: Work, error: Exception) -> None:
    """Say why it has no answer: to the operator too, unless it asked for what engines here are not built for."""
    if isinstance(error, D3tomError):
        if not isinstance(error, SizeError):
            _LOG.error("a request that was accepted has no answer: %s", error)
    else:
        _LOG.error("a request stopped on an unexpected error", exc_info=error)
    work.tell(error)


def _answer_alone(model: Model, work: Work) -> None:
    with model.steps(work.take_pictures(), work.question, **work.settings) as steps:
        for step in steps:
            if work.given_up:
                return
            if work.steps:
                work.tell(step)
        work.tell(steps.answer)
