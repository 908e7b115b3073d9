"""A half-denoised answer as pieces of text: what is said, what was just committed, and a block for every mask.

For whoever draws it, on a terminal or on a page. No framework.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

from d3tom_export.prompt.chat import CUT_CHARACTER, answer_parts, decode
from d3tom_export.trust.terminal import legible

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from d3tom_export.loop.denoise import StepRecord

Style = Literal["said", "new", "mask"]


class Piece(NamedTuple):
    """Text of one style."""

    text: str
    style: Style


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


def final_text(ids: Sequence[int], tokenizer: Tokenizer, mask_token_id: int, stops: Sequence[Sequence[int]]) -> str:
    """What an answer begins with for good, of its ``ids`` so far, masks included, up to an end token or a stop.

    That is the text before the first mask, without what a later token may take back yet: the beginning of one of
    ``stops``, of a character, or blanks that an answer does not end with. It only ever grows, and the answer's text
    begins with it. Raises :class:`~d3tom_export.errors.D3tomError` where the tokenizer cannot write the tokens.
    """
    known = list(ids[: next((at for at, token in enumerate(ids) if token == mask_token_id), len(ids))])
    comes = stops if len(known) < len(ids) else ()  # behind an answer that has no mask nothing comes
    held = max((begun(known, stop) for stop in comes), default=0)
    return decode(tokenizer, known[: len(known) - held]).lstrip().rstrip(CUT_CHARACTER).rstrip()


def begun(known: Sequence[object], stop: Sequence[object]) -> int:
    """How many items at the end of ``known`` are the beginning of ``stop``, but not all of it: the most that are.

    In time linear in both (Knuth, Morris and Pratt): stops are strangers', and this is asked at every step.
    """
    most = min(len(stop) - 1, len(known))
    borders, length = [0], 0  # of each beginning of the stop, how much of its end is a beginning too
    for item in stop[1:most]:
        while length and stop[length] != item:
            length = borders[length - 1]
        length += stop[length] == item
        borders.append(length)
    length = 0
    for item in known[len(known) - most :]:
        while length and stop[length] != item:
            length = borders[length - 1]
        length += stop[length] == item
    return length


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
