"""A batch's rows answered by several processes, in order; what a process takes along when it dies is asked again.

Processes are started anew (spawned): runtimes do not outlive a fork. Each opens the bundle once. A process whose parent
is gone ends after the rows at hand.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from d3tom_export.batch.answering import Job, open_answering
from d3tom_export.batch.parcels import Found, Parcel, Parcels
from d3tom_export.batch.rows import Row
from d3tom_export.errors import D3tomError
from d3tom_export.progress import Note


class _Worker:
    """One process and the connection to it."""

    def __init__(self, job: Job, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.parcel: Parcel | None = None

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

    Raises :class:`D3tomError`, at any time, where no process is left that can open the bundle.
    """

    def __init__(self, job: Job, jobs: int, threads: int, note: Note) -> None:
        self._job, self._threads, self._note = job, threads, note
        self._workers = [_Worker(job, threads) for _ in range(jobs)]
        self._dropped = False
        """Whether a process was, and the user told."""
        self.runtime: tuple[str, str] = ("", "")
        """Name and precision of the backend; known after :meth:`__enter__`."""

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self._workers)

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
        self._parcels = Parcels(chunks, len(self._workers))
        return self._parcels.handed_out(
            self._workers, lambda worker: worker.ready and worker.parcel is None, self._send, self._hear
        )

    def _send(self, worker: _Worker, parcel: Parcel) -> None:
        worker.parcel = parcel
        with suppress(OSError):  # it is dead: hearing of it tells
            worker.connection.send(parcel.rows)

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
                self._drop(worker, value)
            elif kind == "ready":
                worker.ready, self.runtime = True, value
            else:
                assert worker.parcel is not None
                self._parcels.answered(worker.parcel, value, worker)
                worker.parcel = None

    def _drop(self, worker: _Worker, why: str) -> None:
        """Go on without a process that could not open the bundle. Raises :class:`D3tomError` where none is left."""
        worker.end()
        self._workers.remove(worker)
        if not self._workers:
            raise D3tomError(why)
        if not self._dropped:
            self._note(f"{why.rstrip('.')}. The other processes go on.")
        self._dropped = True

    def _bury(self, worker: _Worker) -> None:
        """Put another in the place of a dead process; its rows are asked again."""
        if not worker.ready:
            self._drop(
                worker,
                f"A process that opened the bundle died ({worker.death}). Where memory ran out, give fewer --jobs.",
            )
            return
        if worker.parcel is not None:
            self._parcels.died(worker.parcel, worker.death)
        worker.connection.close()
        self._workers[self._workers.index(worker)] = _Worker(self._job, self._threads)


def _work(connection: Connection, job: Job, threads: int) -> None:
    """A process's life: open the bundle, answer what comes, end with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent tells it
    try:
        answering = open_answering(job, threads, lambda sentence: connection.send(("note", sentence)))
    except D3tomError as error:
        connection.send(("failed", str(error)))
        return
    connection.send(("ready", answering.runtime))
    try:
        while True:
            rows = connection.recv()
            connection.send(("done", answering.answer(rows)))
    except (EOFError, OSError):
        return
