"""A batch from its first row to its last, or from where an earlier run of it was stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from d3tom_export.api.model import Model
from d3tom_export.batch.answering import Answering, Job
from d3tom_export.batch.output import Output
from d3tom_export.batch.parcels import Found
from d3tom_export.batch.ray_actors import RayActors, need_ray
from d3tom_export.batch.rows import Row, open_rows
from d3tom_export.batch.workers import Workers
from d3tom_export.errors import CallError, D3tomError
from d3tom_export.progress import Note, Progress, no_note, no_progress
from d3tom_export.quality.lines import EXPECTED

_MOST_JOBS = 256
_MOST_ACTORS = 4096
_CHUNK = 4
"""Batches' worth of rows that a process takes at once and that are written together."""

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

    def __init__(self, job: Job, model: Model) -> None:
        self._answering = Answering(job, model)
        self.runtime = self._answering.runtime

    def answers(self, chunks: Iterable[Sequence[Row]]) -> Iterator[tuple[Sequence[Row], Found]]:
        for chunk in chunks:
            yield chunk, self._answering.answer(chunk)


def run_batch(
    job: Job,
    output: Path,
    jobs: int | None = None,
    loading: Progress = no_progress,
    progress: Progress = no_progress,
    note: Note = no_note,
    ray: str | None = None,
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
        before, seconds = written.done, 0.0
        if before:
            note(f"{output} has {before:,} of {total:,} rows already.")
        if before < total:
            runner: AbstractContextManager[_Here | Workers | RayActors]
            if ray is not None:
                runner = RayActors(job, run, ray, jobs, note)
            elif jobs is None or jobs == 1:
                runner = nullcontext(_Here(job, model))
            else:
                runner = Workers(job, jobs, max(1, (os.cpu_count() or 1) // jobs), note)
            with runner as running:
                written.bind(*running.runtime)
                started, told = time.perf_counter(), 0
                progress("answering", before, total)
                for chunk, found in running.answers(_chunks(written.left(), _CHUNK * job.batch)):
                    written.add(chunk, found)
                    told = _tell(zip(chunk, found, strict=True), told, note)
                    progress("answering", written.done, total)
                seconds = time.perf_counter() - started
        return Outcome(written.done, before, written.failed, seconds)


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


def _chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, size)):
        yield chunk
