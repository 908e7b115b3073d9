"""JSON of strangers: limits on size, depth and numbers, and whatever is wrong said in one paragraph."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from d3tom_export.errors import D3tomError
from d3tom_export.trust.files import read_bytes

MOST_BYTES = 16 << 20
"""Of a JSON file. The largest that is read, an index of shards, takes 0.1 kB a tensor: an 8B model's has 80 kB."""

_MOST_DEEP = 32
"""Levels of nesting. A config has four."""


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**64:
        raise ValueError(f"the number {digits[:20]}… does not fit into 64 bits")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is not finite")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {name[:80]!r} stands there twice")
    return members


def _check_depth(value: Any) -> None:
    """Refuse what is nested deeper than :data:`_MOST_DEEP`: printing or comparing it would fail later."""
    level: list[Any] = [value]
    for _ in range(_MOST_DEEP):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {_MOST_DEEP} levels deep")


def parse_document(content: bytes, *, constants: bool = False) -> Any:
    """What a JSON text holds: UTF-8, numbers finite and integers of at most 64 bits, no name twice, not deep.

    With ``constants`` NaN and Infinity are read too, which JSON lacks and Python writes.

    Raises ``ValueError`` with what is wrong, in words that can stand in a message.
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            parse_int=_integer,
            parse_float=_float,
            parse_constant=float if constants else _constant,
            object_pairs_hook=_members,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {_MOST_DEEP} levels deep") from None
    _check_depth(value)
    return value


def parse_json(content: bytes, *, constants: bool = False) -> dict[str, Any]:
    """The object in a JSON text, read as :func:`parse_document` does. Raises ``ValueError`` likewise."""
    value = parse_document(content, constants=constants)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a JSON {type(value).__name__}, expected an object with named fields")
    return value


def read_json(path: Path, limit: int = MOST_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most ``limit`` bytes, read as :func:`parse_json` does.

    Raises :class:`D3tomError` naming the file and what is wrong with it.
    """
    try:
        return parse_json(read_bytes(path, limit))
    except ValueError as error:
        raise D3tomError(f"{path} cannot be read as JSON: {error}. Fetch the file again or correct it.") from None
