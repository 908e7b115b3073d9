"""The rows of a batch: lines of question files, or pictures of a folder with one question, each taken when its turn is.

Rows are read one by one, so that a file may be of any length, and judged one by one, so that a bad one spoils no other.
Whoever made them may be a stranger: names lead to regular files inside the folder, lines have at most a mebibyte.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from d3tom_export.errors import CallError, D3tomError, listing, printable
from d3tom_export.prompt.samples import INDEX, MOST_INDEX_BYTES, MOST_PICTURE_BYTES, SAMPLES_FILE
from d3tom_export.quality.dataset import ENDINGS, line_files, pictures_of
from d3tom_export.quality.lines import Line, kind_of_file, line_id, parse_line
from d3tom_export.trust.archives import open_archive
from d3tom_export.trust.files import find_inside, is_there, open_file

_LONGEST_LINE = 1 << 20
_MOST_HELD = 256 << 20
"""Bytes of one row's pictures out of an archive."""


@dataclass(frozen=True)
class Row:
    """One row as its file has it, unread."""

    index: int
    """Its place among all rows, from 0."""
    number: int
    """Of its line in its file, from 1: what it is called where it has no id."""
    task: str
    """What its file's name says its questions are."""
    content: bytes
    """Its line without the end; of one that is too long, a little more than is read."""

    @property
    def key(self) -> str:
        """What tells its line from others: a hash."""
        return hashlib.sha256(self.content).hexdigest()[:16]


@dataclass(frozen=True)
class Asked:
    """What a row asks."""

    line: Line
    names: tuple[str, ...]
    """Of its pictures, within the folder."""
    pictures: tuple[str | bytes, ...]
    """Their paths, or what is in them."""


@dataclass(frozen=True)
class Rows:
    """All rows of a batch, in the order of files and lines."""

    name: str
    _files: Sequence[tuple[str, Callable[[], BinaryIO]]]
    """The task of each file of lines, and what opens it."""
    _names: Callable[[str, Line], tuple[str, ...]]
    """Names of a line's pictures, by its task. Raises ``ValueError``."""
    _picture: Callable[[str], str | bytes]
    """A picture of a name. Raises ``ValueError`` or :class:`D3tomError`."""

    def __iter__(self) -> Iterator[Row]:
        index = 0
        for task, opened in self._files:
            with opened() as file:
                for number, content in _lines(file):
                    yield Row(index, number, task, content)
                    index += 1

    def count(self) -> int:
        """How many there are; all files are read for it."""
        return sum(1 for _ in self)

    def ask(self, row: Row) -> Asked:
        """What ``row`` asks. Raises :class:`D3tomError` with what is wrong with it."""
        try:
            if len(row.content) > _LONGEST_LINE:
                raise ValueError(f"it has more than {_LONGEST_LINE:,} bytes")
            line = parse_line(row.content, row.number, row.task, answered=False)
            names = self._names(row.task, line)
            return Asked(line, names, tuple(self._pictures(names)))
        except ValueError as error:
            text = f"The row cannot be asked: {printable(str(error), 400).rstrip('.')}."
            raise D3tomError(text) from error

    def _pictures(self, names: Sequence[str]) -> Iterator[str | bytes]:
        held = 0
        for name in names:
            picture = self._picture(name)
            held += len(picture) if isinstance(picture, bytes) else 0
            if held > _MOST_HELD:
                raise ValueError(f"its pictures have more than {_MOST_HELD:,} bytes")
            yield picture


def id_of(row: Row) -> str:
    """What ``row`` is called in the output: the id that its line has, whatever else is wrong with it, or its number."""
    return line_id(row.content, row.number) if len(row.content) <= _LONGEST_LINE else str(row.number)


def open_rows(data: Path, prompt: str | None) -> Rows:
    """The rows of ``data``: a file of lines, a folder with ``*.jsonl`` files, a zip as bundles have one, all without
    ``prompt``; or with it the pictures of a folder, by their names.

    Lines are those that ``evaluate`` reads, answers or none. Raises :class:`D3tomError` where there is no such thing.
    """
    if prompt is not None:
        return _of_pictures(data, prompt)
    if data.is_dir():
        if any(each.suffix == ".jsonl" for each in data.iterdir()):
            return _of_files(data, line_files(data), str(data))
        if is_there(data, SAMPLES_FILE):
            return _of_archive(find_inside(data, SAMPLES_FILE))
        raise D3tomError(
            f"{data} holds no questions: it has no *.jsonl file. Give a question about its pictures with --prompt, or "
            "a file of lines."
        )
    if data.suffix == ".zip":
        return _of_archive(data)
    return _of_files(data.parent, [data.name], str(data))


def _of_files(folder: Path, files: Sequence[str], name: str) -> Rows:
    opened = [(kind_of_file(Path(file).stem), partial(open_file, find_inside(folder, file))) for file in files]
    return Rows(name, opened, partial(pictures_of, folder), partial(_path_of, folder))


def _path_of(folder: Path, picture: str) -> str:
    path = find_inside(folder, picture)
    size = path.stat().st_size
    if size > MOST_PICTURE_BYTES:
        raise ValueError(f"{printable(picture, 80)} has {size:,} bytes, at most {MOST_PICTURE_BYTES:,} are read")
    return str(path)


def _of_archive(path: Path) -> Rows:
    def read(name: str, limit: int) -> bytes:
        with open_archive(path) as archive:
            return archive.read(name, limit)

    def index() -> BinaryIO:
        try:
            return io.BytesIO(read(INDEX, MOST_INDEX_BYTES))
        except ValueError as error:
            raise D3tomError(f"The questions of {path} cannot be read: {str(error).rstrip('.')}.") from None

    return Rows(
        str(path), [("", index)], lambda _, line: line.pictures or (), lambda name: read(name, MOST_PICTURE_BYTES)
    )


def _of_pictures(folder: Path, prompt: str) -> Rows:
    if not folder.is_dir():
        raise CallError(f"--prompt asks about the pictures of a folder, and {folder} is none. Leave it out.")
    names = sorted(path.name for path in folder.iterdir() if path.suffix[1:].lower() in ENDINGS)
    if not names:
        raise D3tomError(f"{folder} holds no pictures: expected names that end in {listing(ENDINGS)}.")
    lines = [json.dumps({"id": name, "image": name, "question": prompt}).encode() for name in names]
    content = b"\n".join(lines) + b"\n"
    opened = [("", partial(io.BytesIO, content))]
    return Rows(str(folder), opened, partial(pictures_of, folder), partial(_path_of, folder))


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank as far as they are looked at, or too long; of each as much as that."""
    number = 0
    while line := file.readline(_LONGEST_LINE + 2):
        number += 1
        rest = line
        while not rest.endswith(b"\n") and rest:
            rest = file.readline(_LONGEST_LINE)
        content = line.rstrip(b"\r\n")
        cut = len(line) > _LONGEST_LINE + 1 and not line.endswith(b"\n")  # what is behind its blanks was not looked at
        if content.strip() or cut:
            yield number, content
