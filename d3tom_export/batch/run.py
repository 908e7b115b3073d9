"""A batch from its first row to its last, or from where an earlier run of it was stopped."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3tom_export.api.model import Model
from d3tom_export.batch.answering import Answering, Job
from d3tom_export.batch.chunks import Chunks, useful_jobs
from d3tom_export.batch.faults import UNEXPECTED
from d3tom_export.batch.output import Answers, Output
from d3tom_export.batch.parcels import Found
from d3tom_export.batch.ray_actors import RayActors, need_ray
from d3tom_export.batch.rows import Row, open_rows
from d3tom_export.batch.workers import Workers
from d3tom_export.errors import CallError, D3tomError
from d3tom_export.process import cores
from d3tom_export.progress import Note, Progress, no_note, no_progress
from d3tom_export.quality.lines import EXPECTED

_MOST_JOBS = 256
_MOST_ACTORS = 4096
_MOST_FAILURES = 8
"""Rows that may fail unexpectedly, one after the other: by then it is not theirs."""

_MOST_HELD = 256
"""Rows that are not written yet as the last ones may be asked again; they may be a mebibyte long each."""

_MOST_TOLD = 20
"""Rows without an answer that are told of while the others go on."""


@dataclass(frozen=True)
class Outcome:
    """What a batch has come to."""

    rows: int
    """In the output, which are all."""
    before: int
    """Of them, those that an earlier run had written."""
    failed: int
    """Of them, those with an error in place of an answer."""
    seconds: float
    """That this run took to answer the others, loading apart."""


class _Here:
    """The job answered in this process, as :class:`Workers` answer it."""

    workers = 1

    def __init__(self, job: Job, model: Model) -> None:
        self._answering = Answering(job, model)
        self.runtime = self._answering.runtime

    def answers(self, chunks: Iterable[Sequence[Row]]) -> Iterator[tuple[Sequence[Row], Found]]:
        for chunk in chunks:
            found = self._answering.answer(chunk)
            for at, row in enumerate(chunk):
                if UNEXPECTED in found[at]:
                    (found[at],) = self._answering.answer([row])
            yield chunk, found


def run_batch(
    job: Job,
    output: Path,
    jobs: int | None = None,
    loading: Progress = no_progress,
    progress: Progress = no_progress,
    note: Note = no_note,
    ray: str | None = None,
    retry_failed: bool = False,
) -> Outcome:
    """Answer every row of ``job`` that ``output`` has no line for yet: here, in processes, or on a Ray cluster.

    Args:
        job: What is asked.
        output: The file of answers, which is gone on with where it is of this very run, wherever that was.
        jobs: Processes, 1 unless given; with ``ray`` actors, one for each GPU, or core where there is none.
        loading: Called while this process loads stages.
        progress: Called as ("answering", rows done, rows in all).
        note: Called with sentences for the user: of rows that could not be answered, too.
        ray: Address of a cluster as ``ray.init`` takes it, or "local" for one of this machine. The bundle and the
            questions are then at the same path on all its machines.
        retry_failed: Ask the rows anew whose line in ``output`` is an error, before those that it lacks.

    Raises :class:`~d3tom_export.errors.D3tomError` where nothing can be answered: a bad row is none of that.
    """
    most = _MOST_JOBS if ray is None else _MOST_ACTORS
    if not 1 <= (1 if jobs is None else jobs) <= most or job.batch < 1:
        raise CallError(f"{jobs} processes with {job.batch} answers at once cannot be: 1 to {most}, 1 or more.")
    if ray is not None:
        if not ray:
            raise CallError("--ray is empty: give the address of a Ray cluster, or local for one of this machine.")
        need_ray()
    if job.prompt is None and output.suffix == ".jsonl" and output.resolve().parent == job.data.resolve():
        raise CallError(f"--output {output} would be one of the files of --input {job.data}. Give it another folder.")
    rows = open_rows(job.data, job.prompt)
    total = rows.count()
    if not total:
        raise D3tomError(f"{rows.name} has no question. --input takes {EXPECTED}.")
    model = job.model(note, loading)
    run = job.run(model)
    with Output(output, run, rows) as written:
        again = written.failed if retry_failed else 0
        before, seconds = written.done - again, 0.0
        if before or again:
            note(f"{output} has {written.done:,} of {total:,} rows already.")
        if again:
            note(f"{again:,} of them could not be answered and are asked again.")
        if before < total:
            left = total - before
            runner: AbstractContextManager[_Here | Workers | RayActors]
            if ray is not None:
                runner = RayActors(job, run, ray, jobs, note, left)
            elif jobs is None or jobs == 1:
                if before:
                    note(
                        "One process answers. Was it a row that killed the last one, this one will stop there too; "
                        "--jobs 2 passes such a row over."
                    )
                runner = nullcontext(_Here(job, model))
            else:
                jobs = useful_jobs(jobs, left, job.batch)
                runner = Workers(job, jobs, max(1, cores() // jobs), note)
            with runner as running:
                written.bind(*running.runtime)
                started = time.perf_counter()
                writing = _Writing(output, total, before, progress, note)
                if again:
                    with written.failed_rows() as (rows_again, take):
                        writing.write(running, Chunks(rows_again, again, running.workers, job.batch), take)
                chunks = Chunks(written.left(), total - written.done, running.workers, job.batch)
                writing.write(running, chunks, written.add)
                seconds = time.perf_counter() - started
        return Outcome(written.done, before, written.failed, seconds)


class _Writing:
    """Answers on their way into the file; told of as they come.

    Rows that failed unexpectedly are held until another is answered: too many with none between end the batch, and are
    then as if they had not been asked.
    """

    def __init__(self, output: Path, total: int, done: int, progress: Progress, note: Note) -> None:
        self._output, self._total, self._done, self._progress, self._note = output, total, done, progress, note
        self._told = 0
        progress("answering", done, total)

    def write(self, running: _Here | Workers | RayActors, chunks: Chunks, take: Answers) -> None:
        """Hand all answers to the ``chunks`` on to ``take``. Raises :class:`D3tomError` where none come any more."""
        held: list[tuple[Row, Mapping[str, Any]]] = []
        failures = first = 0  # the first of them in held
        for chunk, found in running.answers(chunks):
            chunks.answered(len(chunk))
            for row, body in zip(chunk, found, strict=True):
                if UNEXPECTED in body:
                    first = first if failures else len(held)
                    failures += 1
                elif "error" not in body:
                    failures = 0
                held.append((row, body))
                if failures >= _MOST_FAILURES:
                    self._take(held[:first], take)
                    raise self._end(row, body)
            ready = len(held) if not failures or len(held) - first > _MOST_HELD else first
            self._take(held[:ready], take)
            held, first = held[ready:], 0
        self._take(held, take)

    def _take(self, held: Sequence[tuple[Row, Mapping[str, Any]]], take: Answers) -> None:
        if held:
            rows, found = zip(*held, strict=True)
            take(rows, found)
            self._told = _tell(held, self._told, self._note)
            self._done += len(held)
            self._progress("answering", self._done, self._total)

    def _end(self, row: Row, body: Mapping[str, Any]) -> D3tomError:
        error = str(body["error"]).rstrip(".")
        return D3tomError(
            f"{_MOST_FAILURES} rows could not be answered, none between them was, and nothing says that they are at "
            f"fault; each was asked twice. The last one, row {row.index} ({body['id']}): {error}. Mend what is wrong "
            f"here; the same command then goes on with these rows. What was answered before is in {self._output}. Are "
            "they at fault, take them out of --input."
        )


def _tell(rows: Iterable[tuple[Row, Mapping[str, Any]]], told: int, note: Note) -> int:
    """Say which rows were not answered, the first ones at least; how many were told of by now."""
    for row, body in rows:
        if "error" in body:
            told += 1
            if told <= _MOST_TOLD:
                note(f"row {row.index} ({body['id']}): {body['error']}")
            elif told == _MOST_TOLD + 1:
                note("further rows could not be answered; their lines say why.")
    return told
