"""Rows to answers in one process: each read, asked and answered, or told why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3tom_export.api.answers import Answer, Request
from d3tom_export.api.model import Model
from d3tom_export.api.opening import open
from d3tom_export.batch.faults import failure
from d3tom_export.batch.output import Run
from d3tom_export.batch.rows import Asked, Row, Rows, id_of, open_rows
from d3tom_export.errors import D3tomError
from d3tom_export.process import claim
from d3tom_export.progress import Note, Progress, no_progress
from d3tom_export.quality.answering import sample_seed
from d3tom_export.version import __version__

_MOST_HELD = 128 << 20
"""Bytes of pictures out of an archive that are held at once, the next row's apart."""


@dataclass(frozen=True)
class Job:
    """What a batch asks, of which rows: all that a process needs to know of it."""

    bundle: Path
    opening: Mapping[str, Any]
    """How the bundle is opened, as :func:`d3tom_export.open` takes it."""
    settings: Mapping[str, Any]
    """Of all answers."""
    data: Path
    prompt: str | None
    batch: int
    """Answers at once."""

    def model(self, note: Note, progress: Progress = no_progress) -> Model:
        """The bundle, verified, its stages not loaded yet."""
        return open(self.bundle, load=False, note=note, progress=progress, **self.opening)

    def run(self, model: Model) -> Run:
        """What the answers of ``model`` follow from, its runtime apart."""
        return Run(__version__, **model.fingerprint(**self.settings))


class Answering:
    """One open model that answers a job's rows.

    Args:
        job: The job.
        model: Its model.
    """

    def __init__(self, job: Job, model: Model) -> None:
        self._job, self._model = job, model
        self._rows: Rows = open_rows(job.data, job.prompt)
        described = model.describe()
        self.runtime = described.backend, described.precision + model._built_fingerprint()
        self.run = job.run(model)
        self._seed = job.settings.get("seed", described.generation.seed)

    def answer(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What to write for each of ``rows``: an answer's fields, or its id and an ``error``.

        A row's noise follows from the seed and its index alone, so that neither order nor processes matter.
        """
        asked: dict[int, Asked] = {}
        found: dict[int, dict[str, Any]] = {}
        held = 0
        for row in rows:
            try:
                each = self._rows.ask(row)
            except Exception as error:
                found[row.index] = failure(id_of(row), error)
                continue
            asked[row.index] = each
            held += sum(len(picture) for picture in each.pictures if isinstance(picture, bytes))
            if held >= _MOST_HELD:
                found |= self._answers(asked)
                asked, held = {}, 0
        found |= self._answers(asked)
        return [found[row.index] for row in rows]

    def _answers(self, asked: Mapping[int, Asked]) -> dict[int, dict[str, Any]]:
        """What became of what was asked, by the rows' indices."""
        requests = [
            Request(
                list(each.pictures),
                each.line.question,
                **{**self._job.settings, "seed": sample_seed(self._seed, index)},
            )
            for index, each in asked.items()
        ]
        try:
            answers = self._model.answer_many(requests, batch=self._job.batch)
        except Exception as error:
            return {index: failure(each.line.id, error) for index, each in asked.items()}
        return {index: _fields(each, answer) for (index, each), answer in zip(asked.items(), answers, strict=True)}


def open_answering(job: Job, threads: int, note: Note) -> Answering:
    """What answers in a process of its own, on so many threads; raises nothing but :class:`D3tomError`."""
    claim(threads)
    try:
        return Answering(job, job.model(note))
    except D3tomError:
        raise
    except Exception as error:
        raise D3tomError(f"The bundle cannot be opened: {type(error).__name__}: {error}") from None


def _fields(asked: Asked, answer: Answer | Exception) -> dict[str, Any]:
    if isinstance(answer, Exception):
        return failure(asked.line.id, answer)
    return {
        "id": asked.line.id,
        "image": list(asked.names),
        "question": asked.line.question,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "steps": answer.steps,
        "mean_kept": round(answer.mean_kept, 4),
        "visual_tokens": answer.visual_tokens,
        "prompt_tokens": answer.prompt_tokens,
        "seconds": round(answer.prompt_seconds + answer.denoise_seconds, 4),
    }
