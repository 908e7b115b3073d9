"""Answers that were given, kept in a file line by line: a run that is killed goes on where it was.

The first line binds the file to what was evaluated. Then come, each before it is first spoken of, settings and samples,
and one line for every answer (:mod:`d3tom_export.trust.journal`). Equal settings and samples have equal ids, so a file
may grow by further ones. Imports no framework.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import msgspec

from d3tom_export.errors import D3tomError, listing, printable
from d3tom_export.quality.dataset import Item
from d3tom_export.quality.settings import Setting
from d3tom_export.trust.documents import parse_json
from d3tom_export.trust.journal import Journal
from d3tom_export.trust.schema import Count, Text, check_kinds

_SCHEMA = 1
_SHOWN = 16
"""Characters of what a file is bound to that a message shows: hashes differ in the first ones."""
_REMEDY = "Give --results another file, or remove this one to begin anew."


@dataclass(frozen=True)
class Answered:
    """One question answered in one setting."""

    setting: str
    """:attr:`Setting.id`."""
    sample: int
    """:attr:`Item.index`."""
    text: str
    steps: int
    """That ran."""
    kept: tuple[int, ...]
    """K of each of them."""
    prompt_tokens: int
    visual_tokens: int
    flops: int
    """Of matrix products, from the prompt's embeddings on."""
    seconds: float
    """Likewise."""

    @property
    def mean_kept(self) -> float:
        """Share of the visual tokens that layers behind l* see, over the steps."""
        if not self.visual_tokens:
            return 1.0
        return sum(self.kept) / len(self.kept) / self.visual_tokens


class _AnswerLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An :class:`Answered` in the file."""

    setting: Text
    sample: Count
    text: str
    steps: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    kept: Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]
    prompt_tokens: Count
    visual_tokens: Count
    flops: Count
    seconds: Annotated[float, msgspec.Meta(ge=0)]


class _SampleLine(msgspec.Struct, frozen=True):
    sample: Count
    key: Text


@dataclass(frozen=True)
class Binding:
    """What a file's answers are of. Each field differs where answers may."""

    model: str
    """Of its files' contents."""
    data: str
    """Of the lines of questions; each sample has a key of its own pictures besides."""
    wording: str
    """Of how the model is asked: template and system text."""
    backend: str
    precision: str
    version: str

    def check_same(self, found: Mapping[str, Any], path: Path) -> None:
        """Raise :class:`D3tomError` where a file is bound to something else."""
        mine = asdict(self)
        differing = [
            f"{_WORDS[name]} (there {printable(str(found.get(name))[:_SHOWN])}, here {value[:_SHOWN]})"
            for name, value in mine.items()
            if found.get(name) != value
        ]
        if differing:
            raise D3tomError(f"{path} holds answers of another evaluation: {listing(differing)} differs. {_REMEDY}")


_WORDS = {
    "model": "the model or bundle",
    "data": "the questions",
    "wording": "how the model is asked (--system)",
    "backend": "--backend",
    "precision": "--precision",
    "version": "the version of d3tom-export",
}
"""A binding's fields as users know them."""


class Results:
    """Answers by setting and sample, kept in ``path`` (None: in memory alone). Close it, or use it in ``with``.

    Raises :class:`D3tomError` where the file is no results file, is bound to something else, is damaged before its end,
    or is being written by somebody else.
    """

    def __init__(self, path: Path | None, binding: Binding) -> None:
        self.path, self._binding = path, binding
        self.answers: dict[tuple[str, int], Answered] = {}
        self._settings: set[str] = set()
        self._samples: dict[int, str] = {}
        self._file = None if path is None else self._open(path)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, path: Path) -> Journal:
        journal = Journal(path, "--results", _REMEDY)
        header = _line({"d3tom_export": "evaluate", "schema": _SCHEMA, **asdict(self._binding)})

        def take(number: int, line: bytes) -> None:
            if number == 1:
                self._check_header(path, line)
            else:
                self._take(path, number, line)

        try:
            if not journal.read(header, "results file of evaluate", take):
                journal.append(header)
        except BaseException:
            journal.close()
            raise
        return journal

    def _check_header(self, path: Path, line: bytes) -> None:
        try:
            raw = parse_json(line)
        except ValueError:
            raw = {}
        if raw.get("d3tom_export") != "evaluate" or raw.get("schema") != _SCHEMA:
            raise D3tomError(f"{path} is no results file of this version's evaluate. {_REMEDY}")
        self._binding.check_same(raw, path)

    def _take(self, path: Path, number: int, line: bytes) -> None:
        where = f"{path}, line {number}"
        try:
            raw = parse_json(line)
        except ValueError as error:
            raise D3tomError(f"{where}: {error}. The file is damaged. {_REMEDY}") from None
        if "text" in raw:
            found = check_kinds(raw, _AnswerLine, where, _REMEDY)
            if found.setting not in self._settings or found.sample not in self._samples:
                raise D3tomError(f"{where} answers a setting or a sample that no line before it tells of. {_REMEDY}")
            answered = Answered(**{name: getattr(found, name) for name in _AnswerLine.__struct_fields__})
            self.answers[answered.setting, answered.sample] = answered
        elif "key" in raw:
            sample = check_kinds(raw, _SampleLine, where, _REMEDY)
            self._samples[sample.sample] = sample.key
        elif isinstance(raw.get("setting"), str):
            self._settings.add(raw["setting"])
        else:
            raise D3tomError(f"{where} is none of ours. {_REMEDY}")

    def _add(self, raw: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.append(_line(raw))

    def has(self, setting: Setting, item: Item) -> bool:
        return (setting.id, item.index) in self.answers

    def get(self, setting: Setting, item: Item) -> Answered:
        """What was answered; it must have been."""
        return self.answers[setting.id, item.index]

    def know(self, item: Item, key: str) -> None:
        """An item, with its key (:meth:`DataSet.key`), that is going to be answered, or was.

        Raises :class:`D3tomError` where it was another when it was answered before.
        """
        known = self._samples.get(item.index)
        if known is not None and known != key:
            raise D3tomError(
                f"{self.path} holds answers about other pictures: those of question {item.id} were changed since. "
                f"{_REMEDY}"
            )
        if known is None:
            self._samples[item.index] = key
            told = {"id": item.id, "kind": item.kind, "question": item.question, "answers": item.answers}
            self._add({"sample": item.index, "key": key, **told})

    def add(self, setting: Setting, answered: Answered) -> None:
        """Keep an answer to an item that is known."""
        if setting.id not in self._settings:
            self._settings.add(setting.id)
            self._add({"setting": setting.id, "label": setting.label, **setting.to_json()})
        self.answers[setting.id, answered.sample] = answered
        self._add(asdict(answered))


def _line(raw: Mapping[str, Any]) -> bytes:
    return json.dumps(raw, separators=(",", ":")).encode() + b"\n"
