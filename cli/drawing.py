"""A half-denoised answer as lines of text: what is said, what was just committed, and a block for every mask.

Pure: what it is drawn on is :mod:`d3tom_export.cli.live`'s.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

import click

from d3tom_export.prompt.chat import CUT_CHARACTER, answer_parts
from d3tom_export.trust.terminal import legible

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from d3tom_export.loop.denoise import StepRecord

Style = Literal["said", "new", "mask"]


class Piece(NamedTuple):
    """Text of one style."""

    text: str
    style: Style


Line = list[Piece]


class Said(NamedTuple):
    """The ids of an answer as far as they will be read."""

    ids: list[int]
    """Masks included."""
    new: list[bool]
    """Which of them were committed at the last step."""


def said(record: StepRecord, end_ids: Collection[int]) -> Said:
    """The first row of ``record`` up to its stop, and there up to the first of ``end_ids``: neither is drawn."""
    ids = record.tokens[0, : record.end[0]].tolist()
    end = next((at for at, token in enumerate(ids) if token in end_ids), len(ids))
    return Said(ids[:end], record.transfer[0, :end].tolist())


def mask_block(encoding: str) -> str:
    """What a mask is drawn as, one column wide, where text has this ``encoding``."""
    try:
        "░".encode(encoding)
    except UnicodeEncodeError:
        return "_"
    return "░"


def pieces_of(answer: Said, tokenizer: Tokenizer, mask_token_id: int, encoding: str) -> list[Piece]:
    """What is drawn of an answer, in order: nothing in it that a terminal obeys, or that ``encoding`` has not.

    Committed tokens that stand together are decoded together. A character of which only some bytes are committed is a
    block still; one with a byte that was just committed is new. Raises
    :class:`~d3tom_export.errors.D3tomError` where the tokenizer cannot write the tokens.
    """
    block, pieces, at = mask_block(encoding), [], 0
    runs = [(masked, len(list(run))) for masked, run in groupby(answer.ids, lambda token: token == mask_token_id)]
    for number, (masked, length) in enumerate(runs):
        if masked:
            pieces.append(Piece(block * length, "mask"))
        else:
            run = slice(at, at + length)
            parts = answer_parts(tokenizer, answer.ids[run])
            before, after = number > 0, number + 1 < len(runs)
            pieces += _run(parts, answer.new[run], block, encoding, masks_before=before, masks_after=after)
        at += length
    return [piece for piece in pieces if piece.text]


def _run(
    parts: Sequence[tuple[str, int]],
    new: Sequence[bool],
    block: str,
    encoding: str,
    *,
    masks_before: bool,
    masks_after: bool,
) -> Iterator[Piece]:
    """Pieces of tokens that stand together; at masks a cut character may be completed yet."""
    at = 0
    for number, (text, tokens) in enumerate(parts):
        whole = text.lstrip(CUT_CHARACTER) if masks_before and number == 0 else text
        yield Piece(block * (len(text) - len(whole)), "mask")
        rest = whole.rstrip(CUT_CHARACTER) if masks_after and number + 1 == len(parts) else whole
        yield Piece(_fitting(rest, encoding), "new" if any(new[at : at + tokens]) else "said")
        yield Piece(block * (len(whole) - len(rest)), "mask")
        at += tokens


def _fitting(text: str, encoding: str) -> str:
    """``text`` as a terminal of this ``encoding`` may have it; a tab is four blanks."""
    return legible(text).replace("\t", "    ").encode(encoding, "backslashreplace").decode(encoding)


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
