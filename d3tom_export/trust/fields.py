"""Fields of a stranger's config: kinds and bounds, every problem found as a phrase for one message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from d3tom_export.errors import listing, printable

LARGEST_SIZE = 2**31 - 1
"""Elements along one axis: what 32 bits index."""


_MOST_PINPOINTS, _MOST_TILES, _MOST_CANVAS_PIXELS = 256, 256, 2**25
"""Canvas sizes of a config; views and pixels of a canvas. The release has 5, 4 and 0.6 million, models of its kind up
to 36, 36 and 29 million; a canvas of 2^25 pixels takes 0.4 GB as the tower's input."""


def shown(value: object) -> str:
    """``value`` as a message shows it, however long it is."""
    if type(value) is int:
        return f"{value:,}" if abs(value) < 10**24 else "a number of more than 24 digits"
    return printable(repr(value), 120)


def fixed_field_problems(raw: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Fields of ``raw`` that are there (not null) and have none of the ``allowed`` values."""
    return [
        f"{name} is {shown(raw[name])}, supported: {listing(map(repr, values))}"
        for name, values in allowed.items()
        if raw.get(name) is not None
        and not any(type(value) is type(raw[name]) and value == raw[name] for value in values)
    ]


def number_problems(
    raw: Mapping[str, Any],
    *,
    integers: Mapping[str, int] | None = None,
    floats: Mapping[str, tuple[float, float]] | None = None,
    prefix: str = "",
) -> list[str]:
    """Fields of ``raw`` that are there and are not numbers of their kind and range (JSON's true is none).

    ``integers`` has the largest value of each, the least is 1; ``floats`` the least and the largest.
    """
    problems = []
    value: Any
    for name, most in (integers or {}).items():
        value = raw.get(name)
        if value is None or (type(value) is int and 0 < value <= most):
            continue
        bound = f" of at most {most:,}" if type(value) is int and value > most else ""
        problems.append(f"{prefix}{name} is {shown(value)}, expected a positive integer{bound}")
    for name, (least, largest) in (floats or {}).items():
        value = raw.get(name)
        number = type(value) is int or (type(value) is float and math.isfinite(value))
        if value is None or (number and least <= value <= largest):
            continue
        bound = f" from {least:g} to {largest:g}" if number and value > 0 else ""
        problems.append(f"{prefix}{name} is {shown(value)}, expected a positive number{bound}")
    return problems


def canvas_sizes(name: str, pairs: object, side: int) -> tuple[tuple[tuple[int, int], ...], list[str]]:
    """Canvas sizes (width, height) in pixels, cut into views of ``side`` by ``side``, and what is wrong with them."""
    grid: list[tuple[int, int]] = []
    for pair in pairs if isinstance(pairs, list) else ():
        whole = isinstance(pair, list) and len(pair) == 2
        if not whole or any(type(size) is not int or size < side or size % side for size in pair):
            grid = []
            break
        grid.append((pair[0], pair[1]))
    if not grid:
        return (), [f"{name} is {shown(pairs)}, expected (width, height) pairs in multiples of {side:,}"]
    pixels = max(width * height for width, height in grid)
    if len(grid) <= _MOST_PINPOINTS and pixels <= min(_MOST_CANVAS_PIXELS, _MOST_TILES * side**2):
        return tuple(grid), []
    return (), [
        f"{name} has {len(grid):,} canvases, the largest of {pixels:,} pixels; at most {_MOST_PINPOINTS} are "
        f"supported, each of at most {_MOST_CANVAS_PIXELS:,} pixels in at most {_MOST_TILES} views of {side:,} by "
        f"{side:,}"
    ]
