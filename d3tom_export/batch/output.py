"""The answers of a batch, a line of JSON for each row in the order of the rows, in a file that outlives a kill.

Line n is that of row n, so what is there says how far a run came. Each names the run that made it and the line that it
answers, so that no other run goes on with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from d3tom_export.batch.faults import UNEXPECTED
from d3tom_export.batch.rows import Row, Rows
from d3tom_export.errors import D3tomError, listing, printable
from d3tom_export.trust.documents import parse_json
from d3tom_export.trust.journal import Journal

Answers = Callable[[Sequence[Row], Sequence[Mapping[str, Any]]], None]
"""Takes what became of rows: of each an answer's fields, or an ``error``."""

_REMEDY = "Give --output another file, or remove this one to begin anew."
_MOST_BYTES = 1 << 42
"""Of a file that is gone on with: it is read line by line."""
_WORDS = {
    "version": "the version of d3tom-export",
    "model": "the bundle",
    "wording": "how the model is asked (--system)",
    "settings": "the settings of merging and of the loop",
    "backend": "--backend",
    "precision": "--precision",
}
"""A run's parts as users know them."""


@dataclass(frozen=True)
class Run:
    """What answers of a run follow from, beside the rows."""

    version: str
    model: str
    wording: str
    settings: str
    backend: str = ""
    precision: str = ""
    """Of both "" where no runtime was loaded yet."""

    def __str__(self) -> str:
        return "/".join(getattr(self, name) for name in _WORDS)

    def differing(self, found: Run) -> list[str]:
        """In what ``found`` is another run, in words, as far as this one is known."""
        return [
            f"{word} (there {printable(getattr(found, name), 40)}, here {getattr(self, name)})"
            for name, word in _WORDS.items()
            if getattr(self, name) and getattr(found, name) != getattr(self, name)
        ]

    def check_same(self, text: object, where: str) -> Run:
        """The run that ``text`` names. Raises :class:`D3tomError` where it is another, as far as this one is known."""
        parts = text.split("/") if isinstance(text, str) else []
        if len(parts) != len(_WORDS):
            raise D3tomError(f"{where} is no row of a batch. {_REMEDY}")
        found = Run(*parts)
        if differing := self.differing(found):
            raise D3tomError(f"{where} is of another run: {listing(differing)} differs. {_REMEDY}")
        return found


class Output:
    """The output file of a batch, locked; a context. :meth:`left` are the rows that it lacks.

    Raises :class:`D3tomError` where the file is none of a batch, is of another run or of other rows, is damaged before
    its end, or is being written by somebody else.
    """

    def __init__(self, path: Path, run: Run, rows: Rows) -> None:
        self._path, self._run, self._all, self._rows = path, run, rows, iter(rows)
        self.done = self.failed = 0
        """Rows that are there, and those among them that could not be answered."""
        self._journal = Journal(path, "--output", _REMEDY, _MOST_BYTES)
        try:
            self.done = self._journal.read(_begin(0), "output of a batch", self._take)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._journal.close()

    def left(self) -> Iterator[Row]:
        """The rows that are not there yet, once."""
        return self._rows

    def bind(self, backend: str, precision: str) -> None:
        """Say what runtime answers, before the first :meth:`add`. Raises :class:`D3tomError` where it was another."""
        run = replace(self._run, backend=backend, precision=precision)
        if self.done:
            run.check_same(str(self._run), f"{self._path}, line 1")
        self._run = run

    @contextmanager
    def failed_rows(self) -> Iterator[tuple[Iterator[Row], Answers]]:
        """The rows whose line is an error, and what takes what became of them, in their order, now.

        The file is written anew beside the old one, with the old lines of all other rows and of those that nothing
        was taken of, and put in its place at the end, however that comes; a kill leaves the old file.
        """
        with self._journal.rewritten() as write:
            old = enumerate(self._journal.lines())

            def take(rows: Sequence[Row], found: Sequence[Mapping[str, Any]]) -> None:
                for row, body in zip(rows, found, strict=True):
                    for at, line in old:
                        if at == row.index:
                            break
                        write(line)
                    write(_line(row, self._run, body))
                    self.failed -= "error" not in body

            pairs = zip(self._all, self._journal.lines(), strict=False)
            ended: BaseException | None = None
            try:
                yield (row for row, line in pairs if "error" in parse_json(line)), take
            except BaseException as error:
                ended = error
            for _, line in old:
                write(line)
        if ended is not None:
            raise ended

    def add(self, rows: Sequence[Row], found: Sequence[Mapping[str, Any]]) -> None:
        """Write what became of the next ``rows``: an answer's fields, or an ``error``."""
        assert rows[0].index == self.done
        lines = [_line(row, self._run, body) for row, body in zip(rows, found, strict=True)]
        self._journal.append(b"".join(lines))
        self.done += len(rows)
        self.failed += sum("error" in body for body in found)

    def _take(self, number: int, line: bytes) -> None:
        where, row = f"{self._path}, line {number}", next(self._rows, None)
        try:
            raw = parse_json(line)
        except ValueError as error:
            raise D3tomError(f"{where}: {error}. The file is damaged, or none of a batch. {_REMEDY}") from None
        found = self._run.check_same(raw.get("run"), where)
        if raw.get("index") != number - 1:
            raise D3tomError(f"{where} is not the row that belongs there. The file is damaged. {_REMEDY}")
        if row is None or raw.get("key") != row.key:
            other = "the input has no such row" if row is None else "the input's line is another"
            raise D3tomError(f"{where} answers another row: {other}. {_REMEDY}")
        self._run = found
        self.failed += "error" in raw


def _begin(index: int) -> bytes:
    """How a row's line begins."""
    return f'{{"index":{index},"run":"'.encode()


def _line(row: Row, run: Run, body: Mapping[str, Any]) -> bytes:
    fields = {"index": row.index, "run": str(run), "key": row.key, **body}
    fields.pop(UNEXPECTED, None)
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
