"""What is asked: one question, or a conversation of several turns; written out by a template. Imports no framework."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3tom_export.errors import D3tomError, printable
from d3tom_export.families.family import ROLES, Role, Template
from d3tom_export.trust.documents import MOST_BYTES, parse_document
from d3tom_export.trust.fields import shown
from d3tom_export.trust.files import read_bytes

IMAGE_PLACEHOLDER = "<image>"
"""Stands in what a user says where a picture is shown."""

_MOST_TURNS = 4096
_MOST_PARTS = 4096
"""Of one turn's content."""


@dataclass(frozen=True)
class Turn:
    """What one side says once."""

    role: Role
    content: str


Conversation = tuple[Turn, ...]
"""A system turn or none, then user and assistant in turns, from user to user."""


def conversation(question: str | Conversation, system: str | None) -> Conversation:
    """A question as a conversation of one turn, or the conversation that it is already; ``system`` begins it.

    A conversation's own system turn stays in its place.
    """
    turns = (Turn("user", question),) if isinstance(question, str) else question
    return turns if system is None or turns[0].role == "system" else (Turn("system", system), *turns)


def joined(template: Template, turns: Conversation) -> str:
    """The text of a conversation up to the assistant's answer. Raises :class:`D3tomError` where it cannot be said."""
    first, *rest = turns
    text = template.start
    if first.role == "system":
        if template.before_system is None or template.after_system is None:
            raise D3tomError(
                "This model's own chat template has no place for a system text. Ask without --system, or a system "
                "turn in --prompt-file, and say it in the first question."
            )
        text = template.before_system + _said(template, first) + template.after_system
        first, *rest = rest
    text += _said(template, first)
    for turn in rest:
        between = template.to_assistant if turn.role == "assistant" else template.to_user
        if between is None:
            raise D3tomError(
                "This model's own chat template takes one question and no conversation of several turns. Ask with "
                "--prompt, or give --prompt-file one user turn."
            )
        text += between + _said(template, turn)
    return text + (template.to_assistant if template.to_answer is None else template.to_answer)


def _said(template: Template, turn: Turn) -> str:
    return turn.content.strip() if turn.role in template.strips else turn.content


def with_pictures(turns: Conversation, pictures: int) -> Conversation:
    """``turns`` with a place for each of ``pictures`` pictures.

    Unless they are placed, they come first in the first user turn, each on a line of its own. Raises
    :class:`D3tomError` where another number is placed, or one where no user speaks.
    """
    for turn in turns:
        if turn.role != "user" and IMAGE_PLACEHOLDER in turn.content:
            raise D3tomError(
                f"The {turn.role} turn has {IMAGE_PLACEHOLDER}, and pictures are shown in user turns alone. Move it "
                "there."
            )
    placed = sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in turns)
    if not placed:
        first = next(index for index, turn in enumerate(turns) if turn.role == "user")
        shown_first = Turn("user", f"{IMAGE_PLACEHOLDER}\n" * pictures + turns[first].content)
        return (*turns[:first], shown_first, *turns[first + 1 :])
    if placed != pictures:
        raise D3tomError(
            f"The prompt places {placed} pictures with {IMAGE_PLACEHOLDER} and {pictures} were given. "
            "Give one --image for each, in order."
        )
    return turns


def read_conversation(path: Path) -> Conversation:
    """The conversation in a JSON file: a list of ``{"role": ..., "content": ...}``, or an object with it as "messages".

    A content is a text, or a list of ``{"type": "text", "text": ...}`` and ``{"type": "image"}``; the latter says
    ``<image>`` and a line break. Raises :class:`D3tomError` where the file is none, or the turns are out of order.
    """
    try:
        return parse_conversation(parse_document(read_bytes(path, MOST_BYTES)))
    except ValueError as error:
        raise D3tomError(
            f"{path} is no conversation: {printable(str(error), 300)}. Expected a JSON list of turns such as "
            '[{"role": "user", "content": "What is this?"}]: a system turn or none, then user and assistant in turns, '
            "the last of them the user's."
        ) from None


def parse_conversation(document: Any) -> Conversation:
    """The conversation in a JSON document, as :func:`read_conversation` has it. Raises ``ValueError``."""
    messages = document.get("messages") if isinstance(document, dict) else document
    if not isinstance(messages, list) or not messages:
        raise ValueError('it holds neither a list of turns nor an object with one as "messages"')
    if len(messages) > _MOST_TURNS:
        raise ValueError(f"it has {len(messages):,} turns, at most {_MOST_TURNS:,} are read")
    turns = tuple(_turn(message, f"turn {number}") for number, message in enumerate(messages, 1))
    begins = 1 if turns[0].role == "system" else 0
    for index, turn in enumerate(turns[begins:]):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise ValueError(f"turn {begins + index + 1} is the {turn.role}'s, expected the {expected}'s")
    if turns[-1].role != "user":
        raise ValueError(f"its last turn is the {turns[-1].role}'s, and what is answered is a user's")
    return turns


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        found = sorted(message) if isinstance(message, dict) else type(message).__name__
        raise ValueError(f"{where} has {shown(found)}, expected role and content")
    if message["role"] not in ROLES:
        raise ValueError(f"{where} has role {shown(message['role'])}, expected system, user or assistant")
    return Turn(message["role"], _content(message["content"], where))


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or len(content) > _MOST_PARTS:
        raise ValueError(f"{where} has content {shown(content)}, expected a text or a list of at most {_MOST_PARTS:,}")
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and part.keys() == {"type", "text"} and isinstance(part["text"], str):
        return part["text"]
    if kind == "image" and part.keys() == {"type"}:
        return f"{IMAGE_PLACEHOLDER}\n"
    raise ValueError(
        f'{where} has a part {shown(part)}, expected {{"type": "text", "text": ...}} or {{"type": "image"}} (whose '
        "picture comes with --image)"
    )
