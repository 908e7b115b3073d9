"""Messages of protocol buffers, read strictly: known fields in the form our own writer gives them, and no others.

A reader that skips what it does not know would see another message than the runtime that takes the same bytes. This
one knows every field that our graphs have, and refuses the rest, fields that are there twice among them. The package
protobuf would do, but importing it takes 60 ms, a tenth of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

_VARINT, _FIXED32, _BYTES = 0, 5, 2
"""Forms of a field: a number, four bytes, or a length and so many bytes."""

Known = Mapping[int, bool]
"""The fields of a kind of message, by their tags (number and form): whether they may be there several times."""


def fields(
    *,
    numbers: Collection[int] = (),
    spans: Collection[int] = (),
    floats: Collection[int] = (),
    many: Collection[int] = (),
) -> Known:
    """Fields by number: those that are integers, bytes or floats, and which of them may be there several times."""
    forms = ((_VARINT, numbers), (_BYTES, spans), (_FIXED32, floats))
    return {number << 3 | form: number in many for form, members in forms for number in members}


Span = tuple[int, int]
"""Where bytes begin and end."""


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("it holds a number of more than 64 bits")


def integer(value: int) -> int:
    """A number as the signed one that it stands for."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def read_message(data: bytes, span: Span, known: Known, what: str) -> dict[int, Any]:
    """The fields of the message at ``span`` by number: integers as they are, bytes as spans, repeated ones as lists.

    ``what`` names the message. Raises ``ValueError`` with what is wrong.
    """
    at, end = span
    found: dict[int, Any] = {}
    try:
        while at < end:
            tag = data[at]
            at += 1
            if tag >= 0x80:
                tag, at = _varint(data, at - 1)
            repeated = known.get(tag)
            if repeated is None:
                raise ValueError(f"{what} has a field {tag >> 3} (form {tag & 7}) that graphs of ours do not have")
            form = tag & 7
            value: Any
            if form == _BYTES:
                length = data[at]
                at += 1
                if length >= 0x80:
                    length, at = _varint(data, at - 1)
                value = (at, at + length)
                at += length
            elif form == _VARINT:
                value = data[at]
                at += 1
                if value >= 0x80:
                    value, at = _varint(data, at - 1)
            else:
                value = (at, at + 4)
                at += 4
            if repeated:
                found.setdefault(tag >> 3, []).append(value)
            elif tag >> 3 in found:
                raise ValueError(f"{what} has its field {tag >> 3} twice")
            else:
                found[tag >> 3] = value
    except IndexError:
        at = end + 1
    if at != end:
        raise ValueError(f"{what} ends before its content does")
    return found


def text(data: bytes, span: Span | None) -> str:
    """The text at ``span``, empty where there is none."""
    return "" if span is None else data[span[0] : span[1]].decode()


def varint_bytes(value: int) -> bytes:
    """``value`` (not negative) as it is written."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field_bytes(number: int, content: bytes) -> bytes:
    """A field of bytes as it is written."""
    return varint_bytes(number << 3 | _BYTES) + varint_bytes(len(content)) + content


def rewritten(data: bytes, span: Span, number: int, make: Callable[[Span], bytes | None]) -> bytes:
    """The message at ``span``, which was read before, with what ``make`` makes of each of its fields ``number``.

    A field that it makes None of is left out.
    """
    at, end = span
    pieces, copied = [], at
    while at < end:
        start = at
        tag, at = _varint(data, at)
        if tag & 7 == _VARINT:
            _, at = _varint(data, at)
        elif tag & 7 == _FIXED32:
            at += 4
        else:
            length, at = _varint(data, at)
            if tag >> 3 == number:
                made = make((at, at + length))
                pieces += [data[copied:start], b"" if made is None else field_bytes(number, made)]
                copied = at + length
            at += length
    return b"".join((*pieces, data[copied:end]))
