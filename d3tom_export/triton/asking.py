"""What a request asks: its tensors' bytes to a picture, a question and settings. Imports no server.

Whoever sends requests may be a stranger: a picture is a file's content and never a path, and what is no picture, text
or setting is refused with a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d3tom_export.api.settings import Settings, check_names
from d3tom_export.errors import D3tomError
from d3tom_export.trust.data_uris import base64_of, decoded
from d3tom_export.trust.documents import parse_json
from d3tom_export.trust.schema import check_kinds

if TYPE_CHECKING:
    from d3tom_export.api.pictures import OnePicture
    from d3tom_export.api.settings import Question

MOST_PARAMS_BYTES = 1 << 20
"""Of PARAMS. A history of thousands of words has some ten thousand."""

HISTORY, STREAM = "history", "stream"
"""Entries of PARAMS that are no settings of an answer."""

_LOOK = "docs/triton.md says what a request takes."


@dataclass(frozen=True)
class Asked:
    """One request, as ``Model.steps`` takes it."""

    image: list[OnePicture]
    """Contents of pictures' files, in the order of the prompt's ``<image>``."""
    question: Question
    settings: Mapping[str, Any]
    stream: bool
    """Whether every step is told of, or the answer alone."""


def asked(image: Sequence[bytes], prompt: Sequence[bytes], params: Sequence[bytes]) -> Asked:
    """The request in the elements of IMAGE (any number), PROMPT (one) and PARAMS (one or none).

    Raises :class:`D3tomError`, of one paragraph, for what cannot be asked.
    """
    if len(prompt) != 1 or len(params) > 1:
        raise D3tomError(
            f"PROMPT has {len(prompt)} elements and PARAMS {len(params)}, expected one and at most one. {_LOOK}"
        )
    text = _text(prompt[0], "PROMPT")
    given = _params(params[0]) if params and params[0].strip() else {}
    stream, history = given.pop(STREAM, True), given.pop(HISTORY, [])
    try:
        check_names(given)
    except TypeError as error:
        raise D3tomError(f"PARAMS: {error}. {_LOOK}") from None
    settings = check_kinds(given, Settings, "PARAMS", _LOOK)
    question: Question = [*history, {"role": "user", "content": text}] if history else text
    return Asked([_picture(each) for each in image], question, settings, stream)


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise D3tomError(f"{name} is not UTF-8 text: byte {error.start} is not. {_LOOK}") from None


def _params(content: bytes) -> dict[str, Any]:
    if len(content) > MOST_PARAMS_BYTES:
        raise D3tomError(f"PARAMS has {len(content):,} bytes, at most {MOST_PARAMS_BYTES:,} are read. {_LOOK}")
    try:
        given = parse_json(content)
    except ValueError as error:
        raise D3tomError(f"PARAMS is no JSON object of settings: {error}. {_LOOK}") from None
    check_kinds(given.get(STREAM, True), bool, f"PARAMS, {STREAM}", _LOOK)
    check_kinds(given.get(HISTORY, []), list[dict[str, str]], f"PARAMS, {HISTORY}", _LOOK)
    return given


def _picture(content: bytes) -> bytes:
    """``content``, or what a data URI in its place holds: JSON has no bytes, and requests over HTTP are JSON."""
    if not content.startswith(b"data:"):
        return content
    data = base64_of(content.decode(errors="replace"))
    if data is None:
        raise D3tomError(f"A data URI in IMAGE is no picture's: expected data:image/png;base64,... {_LOOK}")
    try:
        return decoded(data)
    except ValueError as error:
        raise D3tomError(f"A data URI in IMAGE {error}. {_LOOK}") from None
