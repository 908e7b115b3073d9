"""A batch's rows answered by several processes, in order; what a process takes along when it dies is asked again.

Processes are started anew (spawned): runtimes do not outlive a fork. Each opens the bundle once. A process whose parent
is gone ends after the rows at hand.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from d3tom_export.batch.answering import Answering, Job
from d3tom_export.batch.rows import Row
from d3tom_export.errors import D3tomError
from d3tom_export.process import claim
from d3tom_export.progress import Note

_AHEAD = 4
"""Chunks for each process that may be out or done before the next one in order is: what is held in memory."""

Found = list[dict[str, Any]]


@dataclass(frozen=True)
class _Task:
    """Rows of a chunk that are asked together."""

    chunk: int
    rows: Sequence[Row]
    deaths: int = 0
    """Of processes that had them."""


@dataclass
class _Chunk:
    """What is known of a chunk's rows so far, by index."""

    rows: Sequence[Row]
    found: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return len(self.found) == len(self.rows)


class _Worker:
    """One process and the connection to it."""

    def __init__(self, job: Job, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.task: _Task | None = None

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()

    @property
    def death(self) -> str:
        """How it ended."""
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"exit code {code}"
        try:
            return f"signal {-code}, {signal.Signals(-code).name}"
        except ValueError:
            return f"signal {-code}"


class Workers:
    """``jobs`` processes for one job; a context, which ends them.

    Raises :class:`D3tomError`, at any time, where a process cannot open the bundle or dies of it.
    """

    def __init__(self, job: Job, jobs: int, threads: int, note: Note) -> None:
        self._job, self._threads, self._note = job, threads, note
        self._workers = [_Worker(job, threads) for _ in range(jobs)]
        self.runtime: tuple[str, str] = ("", "")
        """Name and precision of the backend; known after :meth:`__enter__`."""

    def __enter__(self) -> Workers:
        try:
            while not any(worker.ready for worker in self._workers):
                self._hear()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    def answers(self, chunks: Iterable[Sequence[Row]]) -> Iterator[tuple[Sequence[Row], Found]]:
        """Each of ``chunks`` with what was found of its rows, in order."""
        coming, started, given = iter(chunks), 0, 0
        self._out: dict[int, _Chunk] = {}
        self._again: deque[_Task] = deque()
        more, most = True, _AHEAD * len(self._workers)
        while more or self._out:
            idle = [worker for worker in self._workers if worker.ready and worker.task is None]
            for worker in idle:
                if self._again:
                    self._send(worker, self._again.popleft())
                elif more and started - given < most:
                    rows = next(coming, None)
                    if rows is None:
                        more = False
                        break
                    self._out[started] = _Chunk(rows)
                    self._send(worker, _Task(started, rows))
                    started += 1
                else:
                    break
            while given in self._out and self._out[given].whole:
                chunk = self._out.pop(given)
                given += 1
                yield chunk.rows, [chunk.found[row.index] for row in chunk.rows]
            if self._out or (more and not idle):
                self._hear()

    def _send(self, worker: _Worker, task: _Task) -> None:
        worker.task = task
        with suppress(OSError):  # it is dead: hearing of it tells
            worker.connection.send(task.rows)

    def _hear(self) -> None:
        """Wait for a process to say something, or to die."""
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection)):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                kind, value = worker.connection.recv()
            except (EOFError, OSError):
                self._bury(worker)
                continue
            if kind == "note":
                self._note(value)
            elif kind == "failed":
                raise D3tomError(value)
            elif kind == "ready":
                worker.ready, self.runtime = True, value
            else:
                assert worker.task is not None
                for row, body in zip(worker.task.rows, value, strict=True):
                    self._out[worker.task.chunk].found[row.index] = body
                worker.task = None

    def _bury(self, worker: _Worker) -> None:
        """Put another in the place of a dead process. Its rows are asked again, each by itself; twice is enough."""
        death, task = worker.death, worker.task
        if not worker.ready:
            raise D3tomError(
                f"A process that opened the bundle died ({death}). Where memory ran out, give fewer --jobs."
            )
        if task is not None:
            for row in task.rows:
                if len(task.rows) == 1 and task.deaths:
                    self._out[task.chunk].found[row.index] = {
                        "id": str(row.number),
                        "error": f"The process that answered this row died ({death}), and so did another one before.",
                    }
                else:
                    self._again.append(_Task(task.chunk, [row], task.deaths + 1))
        worker.connection.close()
        self._workers[self._workers.index(worker)] = _Worker(self._job, self._threads)


def _work(connection: Connection, job: Job, threads: int) -> None:
    """A process's life: open the bundle, answer what comes, end with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent tells it
    claim(threads)
    try:
        answering = Answering(job, job.model(lambda sentence: connection.send(("note", sentence))))
    except D3tomError as error:
        connection.send(("failed", str(error)))
        return
    except Exception as error:
        connection.send(("failed", f"The bundle cannot be opened: {type(error).__name__}: {error}"))
        return
    connection.send(("ready", answering.runtime))
    try:
        while True:
            rows = connection.recv()
            connection.send(("done", answering.answer(rows)))
    except (EOFError, OSError):
        return
