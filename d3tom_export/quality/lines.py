"""Lines of question files: our own samples, plain question-and-answer lines, and what lmms-eval logs.

What `lmms-eval --log_samples` writes (`*_samples_TASK.jsonl`) has the question as ``input``, the answer as ``target``,
a list of several in Python's spelling, and the place of the question in its data set as ``doc_id``; pictures are not in
it. Imports no framework.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d3tom_export.errors import printable
from d3tom_export.trust.documents import parse_json
from d3tom_export.trust.files import check_name

EXPECTED = (
    "one JSON object a line: image (a file's name, a list of them, or null), question (or prompt), answer (or answers, "
    "a list of which any is right), and where there is one a kind; or what `lmms-eval --log_samples` writes"
)

MOST_PICTURES = 64
"""Of one question."""
MOST_ANSWERS = 256
"""Of one question, any of which is right; VQA's questions have ten."""
LONGEST_ANSWER = 4096
"""Characters. Edit distances take time by the product of two lengths."""
_LONGEST_LIST = 1 << 16
"""Characters of a target that is read as a list."""

_LOGGED = re.compile(r".*_samples_(?P<task>.+)")
"""The stem of a file of lmms-eval's."""


@dataclass(frozen=True)
class Line:
    """One question as a line has it."""

    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    pictures: tuple[str, ...] | None
    """Names of files; None where the line leaves them to be found by ``id``."""


def kind_of_file(stem: str) -> str:
    """What a file's questions are, by its name without the ending: the task, where lmms-eval named it."""
    found = _LOGGED.fullmatch(stem)
    return found["task"] if found else stem


def parse_line(content: bytes, number: int, kind: str, *, answered: bool = True) -> Line:
    """The question in line ``number``, of ``kind`` where it has none; ``answered``: it must have an answer.

    Raises ``ValueError`` with what is wrong.
    """
    raw = parse_json(content, constants=True)  # in metrics, which are not read: lmms-eval logs them
    logged = "doc_id" in raw and "target" in raw
    question = _first(raw, ("question", "prompt", "input", "arguments"))
    while isinstance(question, list) and question:  # arguments: of one request, or of several
        question = question[0]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"it has {_shown(question)} for question, expected a text")
    own = raw.get("kind")
    if own is not None and not isinstance(own, str):
        raise ValueError(f"it has {_shown(own)} for kind, expected a text")
    identity = _identity(raw, number)
    pictures = _first(raw, ("image", "picture", "images"))
    found = None
    if pictures is not None or not logged or raw.keys() & {"image", "picture", "images"}:
        found = _pictures(pictures)
    return Line(identity, question, _answers(raw) if answered else (), own or kind, found)


def line_id(content: bytes, number: int) -> str:
    """The id of the question in line ``number``, whatever else is wrong with it; the number where it has none."""
    try:
        return _identity(parse_json(content), number)
    except ValueError:
        return str(number)


def _identity(raw: Mapping[str, Any], number: int) -> str:
    identity = _first(raw, ("id", "question_id", "doc_id"))
    if identity is None:
        identity = number
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise ValueError(f"it has {_shown(identity)} for its id, expected a text or a whole number")
    return printable(str(identity), 200)


def _shown(value: object) -> str:
    return "nothing" if value is None else printable(repr(value), 60)


def _first(raw: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of the fields ``names`` that says something."""
    return next((raw[name] for name in names if raw.get(name) is not None), None)


def _pictures(value: Any) -> tuple[str, ...]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    if len(names) > MOST_PICTURES:
        raise ValueError(f"it has {len(names)} pictures, at most {MOST_PICTURES} are shown")
    return tuple(check_name(name) for name in names)


def _answers(raw: Mapping[str, Any]) -> tuple[str, ...]:
    value = _first(raw, ("answers", "answer", "target"))
    if isinstance(value, str) and value == raw.get("target"):
        value = _listed(value)
    values = value if isinstance(value, list) else [value]
    values = [each.get("answer") if isinstance(each, dict) else each for each in values]  # as VQA has them
    if not values or not all(map(_is_answer, values)):
        raise ValueError(f"it has {_shown(value)} for answer, expected a text, a number or a list of them")
    if len(values) > MOST_ANSWERS:
        raise ValueError(f"it has {len(values)} answers, at most {MOST_ANSWERS} are read")
    answers = tuple(dict.fromkeys(str(each) for each in values))
    longest = max(map(len, answers))
    if longest > LONGEST_ANSWER:
        raise ValueError(f"it has an answer of {longest:,} characters, at most {LONGEST_ANSWER:,} are read")
    return answers


def _is_answer(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _listed(target: str) -> str | list[Any]:
    """The list that a target is in Python's spelling; else the target, which is one answer."""
    if not target.startswith("[") or len(target) > _LONGEST_LIST:
        return target
    try:
        value = ast.literal_eval(target)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return target
    return value if isinstance(value, list) else target
