"""Valid documents made wrong as bytes say, which libFuzzer or Hypothesis choose: the same bytes, the same fault."""

from __future__ import annotations

import copy
import json
from typing import Any

INTERESTING: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 10**9, 0.5, -0.0, 1e-300, 1e300, "", "x",
    "..", "../x", "/etc/passwd", "a/b", "\x1b[2J", "\u202e", "\n", "é", "x" * 300, "F32", "BF16", "float32",
    "model.safetensors",
    [], {}, [[]], [None], {"": None}, [0, 0], [1, -1], ["x"], [10**9, 10**9],
)  # fmt: skip
"""Values that documents hold in the wrong place."""


class Choices:
    """Numbers drawn from bytes; zeros once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._next = data, 0

    def below(self, limit: int) -> int:
        """A number of 0..limit-1."""
        size = 1 if limit <= 256 else 3
        raw = self._data[self._next : self._next + size]
        self._next += size
        return int.from_bytes(raw, "little") % max(limit, 1)

    @property
    def left(self) -> bool:
        return self._next < len(self._data)

    def rest(self) -> bytes:
        """All bytes that are left."""
        raw, self._next = self._data[self._next :], len(self._data)
        return raw


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys = container.keys() if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])
    return found


def edited(document: dict[str, Any], choices: Choices) -> bytes:
    """``document`` with up to four edits, as JSON: values replaced, removed, doubled, moved, numbers a little off."""
    changed = copy.deepcopy(document)
    for _ in range(1 + choices.below(4)):
        places = _places(changed)
        if not places:
            break
        container, key = places[choices.below(len(places))]
        value, kind = container[key], choices.below(6)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[str(INTERESTING[choices.below(len(INTERESTING))])] = container.pop(key)
        elif kind == 2:
            other, name = places[choices.below(len(places))]
            container[key] = copy.deepcopy(other[name])
        elif kind == 3 and isinstance(value, (int, float)):
            container[key] = value + (choices.below(5) - 2)
        else:
            container[key] = copy.deepcopy(INTERESTING[choices.below(len(INTERESTING))])
    return json.dumps(changed).encode()


def edited_bytes(content: bytes, choices: Choices) -> bytes:
    """``content`` with up to eight edits of bytes: changed, cut out, put in, cut off."""
    changed = bytearray(content)
    for _ in range(1 + choices.below(8)):
        if not changed:
            break
        place, kind = choices.below(min(len(changed), 1 << 24)), choices.below(4)
        if kind == 0:
            changed[place] = choices.below(256)
        elif kind == 1:
            del changed[place : place + 1 + choices.below(64)]
        elif kind == 2:
            changed[place:place] = bytes(choices.below(256) for _ in range(1 + choices.below(8)))
        else:
            del changed[place:]
    return bytes(changed)
