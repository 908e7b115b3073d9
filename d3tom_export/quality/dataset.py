"""Questions about pictures with known answers: a folder of JSON lines, one such file, or a zip as bundles have.

Lines are read at once, pictures when they are asked for: a set of thousands takes the memory of one. Whoever made the
set may be a stranger: names lead to regular files inside its folder, sizes are limited before anything is read. Imports
no framework.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from d3tom_export.errors import D3tomError, printable
from d3tom_export.prompt.samples import INDEX, MOST_INDEX_BYTES, MOST_PICTURE_BYTES, SAMPLES_FILE, numbered_lines
from d3tom_export.quality.lines import EXPECTED, Line, kind_of_file, parse_line
from d3tom_export.trust.archives import open_archive
from d3tom_export.trust.files import check_name, find_inside, is_there, read_bytes
from d3tom_export.trust.images import decode_picture

PICTURES = "images"
"""Folder of the pictures of lines that name none, each by its question's id."""
ENDINGS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm")
_MOST_FILES = 1024
"""Files of lines in a folder."""
_MOST_BYTES = 256 << 20
"""Of all lines together; they take a few times that in memory."""


@dataclass(frozen=True)
class Item:
    """One question; any of ``answers`` is right."""

    index: int
    """Its place in the set, from 0."""
    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    pictures: tuple[str, ...]
    """Names within the set."""


@dataclass(frozen=True)
class DataSet:
    """A set of questions, in the order of its files and lines."""

    name: str
    items: list[Item]
    sha256: str
    """Of all its lines. Pictures are told apart by what :meth:`key` says."""
    _read: Callable[[str], bytes]

    def first(self, count: int | None) -> list[Item]:
        """The first ``count`` questions, or all (None). Raises :class:`D3tomError` where there are fewer."""
        if count is not None and count > len(self.items):
            raise D3tomError(
                f"{self.name} has {len(self.items)} questions and {count} were asked for. Ask for fewer with --samples."
            )
        return self.items[:count]

    def contents(self, item: Item) -> list[bytes]:
        """The files of an item's pictures. Raises :class:`D3tomError`."""
        return [self._read(name) for name in item.pictures]

    def key(self, item: Item, contents: Sequence[bytes]) -> str:
        """What tells an item from others: a hash of its question and of its pictures' files."""
        digest = hashlib.sha256(item.question.encode())
        for content in contents:
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()[:16]

    def decode(self, item: Item, contents: Sequence[bytes]) -> list[Image.Image]:
        """An item's pictures, each within the limits of :mod:`d3tom_export.trust.images`."""
        names = (f"{printable(name, 80)} in {self.name}" for name in item.pictures)
        return [decode_picture(io.BytesIO(content), name) for name, content in zip(names, contents, strict=True)]


def groups_of(items: Sequence[Item]) -> list[int]:
    """For each question a number that it has in common with those that show one of its pictures (by their names)."""
    groups, owner = list(range(len(items))), dict[str, int]()

    def root(at: int) -> int:
        while groups[at] != at:
            groups[at] = at = groups[groups[at]]
        return at

    for at, item in enumerate(items):
        for name in item.pictures:
            groups[root(at)] = root(owner.setdefault(name, at))
    return [root(at) for at in range(len(items))]


def samples_of(folder: Path) -> DataSet:
    """The samples that a bundle or a checkpoint brings along. Raises :class:`D3tomError` where it has none."""
    if not is_there(folder, SAMPLES_FILE):
        raise D3tomError(
            f"{folder} brings no questions along: it has no {SAMPLES_FILE}. Give some with --data DIR: {EXPECTED}."
        )
    return _of_archive(find_inside(folder, SAMPLES_FILE))


def open_data(path: Path) -> DataSet:
    """The questions of a folder with ``*.jsonl`` files, of one such file, or of a zip like :data:`SAMPLES_FILE`.

    A folder that has no such file is looked into for that zip. Names of pictures are within the folder; of a line as
    lmms-eval logs it, which names none, the picture is ``images/TASK/ID.png`` or ``images/ID.png`` (or another ending).
    Raises :class:`D3tomError`.
    """
    if path.is_dir():
        if is_there(path, SAMPLES_FILE) and not any(each.suffix == ".jsonl" for each in path.iterdir()):
            return samples_of(path)
        return _of_files(path, line_files(path), str(path))
    if path.suffix == ".zip":
        return _of_archive(path)
    return _of_files(path.parent, [path.name], str(path))


def line_files(folder: Path) -> list[str]:
    """The names of a folder's files of lines, in their order. Raises :class:`D3tomError` without any."""
    files = sorted(each.name for each in folder.iterdir() if each.suffix == ".jsonl")
    if not files or len(files) > _MOST_FILES:
        found = f"{len(files):,} of them, at most {_MOST_FILES:,} are read" if files else "none"
        raise D3tomError(
            f"{folder} holds no questions: expected *.jsonl files, found {found}. --data takes {EXPECTED}."
        )
    return files


def _of_archive(path: Path) -> DataSet:
    try:
        with open_archive(path) as archive:
            content = archive.read(INDEX, MOST_INDEX_BYTES)
            items = _items(content, f"its {INDEX}", "", 0, lambda line: line.pictures or ())
    except (ValueError, D3tomError) as error:
        raise _refused(path, error) from None

    def read(name: str) -> bytes:
        try:
            with open_archive(path) as archive:
                return archive.read(name, MOST_PICTURE_BYTES)
        except ValueError as error:
            raise _refused(path, error) from None

    return _data_set(str(path), items, hashlib.sha256(content).hexdigest(), read)


def _of_files(folder: Path, files: Sequence[str], name: str) -> DataSet:
    items: list[Item] = []
    digest, left = hashlib.sha256(), _MOST_BYTES

    for file in files:
        path = folder / file
        try:
            content = read_bytes(find_inside(folder, file), left)
            left -= len(content)
            task = kind_of_file(path.stem)
            found = partial(pictures_of, folder, task)
            items += _items(content, file, task if len(files) > 1 else "", len(items), found)
        except ValueError as error:
            raise _refused(path, error) from None
        digest.update(hashlib.sha256(content).digest())
    return _data_set(
        name, items, digest.hexdigest(), lambda picture: read_bytes(find_inside(folder, picture), MOST_PICTURE_BYTES)
    )


def pictures_of(folder: Path, task: str, line: Line) -> tuple[str, ...]:
    """Names of a line's pictures: its own, or the one that lies under its id. Raises ``ValueError`` without either."""
    if line.pictures is not None:
        return line.pictures
    places = [f"{PICTURES}/{task}/{line.id}", f"{PICTURES}/{line.id}"]
    names = [check_name(f"{place}.{ending}") for place in places for ending in ENDINGS]
    there = next((name for name in names if is_there(folder, name)), None)
    if there is None:
        raise ValueError(
            f"it names no picture, as lines of lmms-eval do not, and there is none for it, {places[1]}.png or another "
            f"ending. Put the pictures into {PICTURES}/ under their doc_id, or add a field image (null: no picture)"
        )
    return (there,)


def _items(content: bytes, name: str, kind: str, start: int, pictures: Callable[[Line], tuple[str, ...]]) -> list[Item]:
    items: list[Item] = []
    for number, text in numbered_lines(content, name):
        try:
            line = parse_line(text, number, kind)
            item = Item(start + len(items), line.id, line.question, line.answers, line.kind, pictures(line))
        except (ValueError, D3tomError) as error:
            raise ValueError(f"line {number} of {name}: {printable(str(error), 400)}".rstrip(".")) from None
        items.append(item)
    return items


def _data_set(name: str, items: list[Item], sha256: str, read: Callable[[str], bytes]) -> DataSet:
    if not items:
        raise D3tomError(f"{name} has no question. --data takes {EXPECTED}.")
    return DataSet(name, items, sha256, read)


def _refused(path: Path, error: Exception) -> D3tomError:
    return D3tomError(f"The questions of {path} cannot be read: {str(error).rstrip('.')}. Expected {EXPECTED}.")
