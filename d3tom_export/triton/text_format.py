"""Protocol buffers' text format, as far as a server's configuration needs it.

Written here because the library that knows it, protobuf, is no dependency of ours; the tests have protobuf read what
this writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias


class Symbol(str):
    """A value of an enumeration, which stands without quotes."""


Value: TypeAlias = "str | bool | int | Mapping[str, Value] | Sequence[Value]"
"""A text, a :class:`Symbol`, a number, a message (by its fields), or several of one of these."""
Message: TypeAlias = Mapping[str, Value]


def to_text(message: Message) -> str:
    """``message``, a field a line."""
    return "".join(f"{line}\n" for line in _fields(message, ""))


def string_map(entries: Mapping[str, str]) -> list[Message]:
    """A ``map<string, ModelParameter>``, as ``parameters`` are."""
    return [{"key": key, "value": {"string_value": value}} for key, value in entries.items()]


def _fields(message: Message, indent: str) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name} {{"
            yield from _fields(value, indent + "  ")
            yield f"{indent}}}"
        elif isinstance(value, str) or not isinstance(value, Sequence):
            yield f"{indent}{name}: {_scalar(value)}"
        elif any(isinstance(each, Mapping) for each in value):
            for each in value:
                yield from _fields({name: each}, indent)
        else:
            yield f"{indent}{name}: [{', '.join(map(_scalar, value))}]"


def _scalar(value: Value) -> str:
    if isinstance(value, Symbol):
        return value
    if isinstance(value, str):
        return f'"{"".join(map(_escaped, value))}"'
    return str(value).lower()  # a number, true, false


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else "".join(f"\\{byte:03o}" for byte in character.encode())
