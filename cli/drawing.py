"""A half-denoised answer's pieces as lines of a terminal: wrapped, windowed and in place of the ones before.

Pure: what it is drawn on is :mod:`d3tom_export.cli.live`'s.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import click

from d3tom_export.prompt.pieces import Piece

Line = list[Piece]


def columns_of(character: str) -> int:
    """How many columns a terminal may take for ``character``, rather more than fewer."""
    if unicodedata.category(character) in ("Mn", "Me"):
        return 1 if character == "\ufe0f" else 0  # it makes a picture of what is before it, which may be wider
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrapped(pieces: Sequence[Piece], columns: int) -> list[Line]:
    """``pieces`` in lines of at most so many ``columns`` (a wide character has a line of one to itself)."""
    lines: list[Line] = [[]]
    at = 0
    for text, style in pieces:
        held = ""
        for character in text:
            wide = columns_of(character)
            if character == "\n" or (at > 0 and at + wide > columns):
                lines[-1].append(Piece(held, style))
                lines.append([])
                held, at = "", 0
            if character != "\n":
                held, at = held + character, at + wide
        lines[-1].append(Piece(held, style))
    return [[piece for piece in line if piece.text] for line in lines]


def window(lines: Sequence[Line], rows: int) -> slice:
    """Which of ``lines`` are shown on ``rows``: those around the first mask, or the last ones where there is none."""
    masks = (at for at, line in enumerate(lines) if any(piece.style == "mask" for piece in line))
    first = min(next(masks, len(lines)) - rows // 2, len(lines) - rows)
    return slice(max(first, 0), max(first, 0) + rows)


def painted(line: Line, *, colour: bool) -> str:
    """``line`` with a terminal's codes: what is new is bold, and green where ``colour`` is wanted; masks are faint."""
    return "".join(
        click.style(text, bold=True, fg="green" if colour else None)
        if style == "new"
        else click.style(text, dim=True)
        if style == "mask"
        else text
        for text, style in line
    )


def frame(lines: Sequence[str], over: int) -> str:
    """What draws ``lines`` in the place of the ``over`` lines that were drawn before.

    The cursor stays at the beginning of the last line, so that what is typed, ^C for one, adds no row. The terminal is
    kept from wrapping meanwhile: should it take more columns for a character than it was given, the line's end is lost,
    and no row is added that would not be cleared.
    """
    # Cleared line by line: terminals such as tmux keep a screen that is cleared as a whole, as if it had scrolled away.
    # And before they are written: behind a full line the cursor still stands on its last character.
    fewer = max(0, over - len(lines))
    drawn = "\r\n".join(f"\033[K{line}" for line in [*lines, *[""] * fewer])
    return f"\033[?7l{_to_first_of(over)}{drawn}{_up(fewer)}\r\033[?7h"


def cleared(over: int) -> str:
    """What takes ``over`` drawn lines away again, also where a frame was broken off; the cursor is where they began."""
    return "\033[0m" + frame([""], over)


def _to_first_of(lines: int) -> str:
    return "\r" + _up(lines - 1)


def _up(lines: int) -> str:
    return f"\033[{lines}A" if lines > 0 else ""
