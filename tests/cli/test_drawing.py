"""Half-denoised answers as lines of text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from d3tom_export.cli.drawing import (
    Piece,
    Said,
    cleared,
    columns_of,
    frame,
    mask_block,
    painted,
    pieces_of,
    said,
    window,
    wrapped,
)
from d3tom_export.loop.denoise import StepRecord, StepResult
from d3tom_export.prompt.chat import answer_parts
from d3tom_export.trust.terminal import legible
from tests.cli.screen import Screen
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
"""Every byte is a token."""

MASK, END = (TOKENIZER.token_to_id(token) for token in ("<|mdm_mask|>", "<|eot_id|>"))
EURO = TOKENIZER.encode("€").ids


def _ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def _pieces(ids: list[int], new: tuple[int, ...] = (), encoding: str = "utf-8") -> list[Piece]:
    return pieces_of(Said(ids, [at in new for at in range(len(ids))]), TOKENIZER, MASK, encoding)


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_masks_are_blocks_and_what_was_just_committed_is_new() -> None:
    assert _pieces([*_ids("ab"), MASK, MASK, *_ids("c")], new=(1,)) == [
        ("a", "said"), ("b", "new"), ("░░", "mask"), ("c", "said"),
    ]  # fmt: skip
    assert _pieces([]) == []
    assert _pieces([MASK] * 3) == [("░░░", "mask")]


def test_a_character_is_a_block_until_all_of_its_bytes_are_committed() -> None:
    a, b, c = EURO
    assert _pieces([a, MASK, MASK], new=(0,)) == [("░", "mask"), ("░░", "mask")]
    assert _pieces([a, b, MASK]) == [("░", "mask"), ("░", "mask")]
    assert _pieces([MASK, b, c, *_ids("!")]) == [("░", "mask"), ("░░", "mask"), ("!", "said")]
    assert _pieces([MASK, MASK, c]) == [("░░", "mask"), ("░", "mask")]
    assert _pieces([*_ids("x"), a, b, MASK, *_ids("y")]) == [
        ("x", "said"), ("░", "mask"), ("░", "mask"), ("y", "said"),
    ]  # fmt: skip
    assert _pieces([MASK, *EURO, MASK]) == [("░", "mask"), ("€", "said"), ("░", "mask")]
    assert _pieces(EURO, new=(2,)) == [("€", "new")]
    # No mask is left that could complete it: so it will be in the answer.
    assert _text(_pieces([a, *_ids("x"), MASK])) == "\ufffdx░"
    assert _text(_pieces([*_ids("x"), a])) == "x\ufffd"


def test_special_tokens_are_not_drawn() -> None:
    assert _pieces([*_ids("a"), END, *_ids("b")], new=(1,)) == [("a", "said"), ("b", "said")]


def test_nothing_that_a_terminal_obeys_is_drawn() -> None:
    ids = [*_ids("\x1b"), MASK, *_ids("[31mred\r\t\u202e\x07\n")]
    text = _text(_pieces(ids))
    assert text == "\\x1b░[31mred\\r    \\u202e\\x07\n"
    assert _text(_pieces([*_ids("é€"), MASK], encoding="ascii")) == "\\xe9\\u20ac_"
    assert _text(_pieces([*_ids("é€"), MASK], encoding="latin-1")) == "é\\u20ac_"
    assert mask_block("cp437") == "░"


@given(st.lists(st.sampled_from([*range(256), *[MASK] * 64, *EURO * 16, END]), max_size=40), st.integers(0, 2**40))
def test_any_tokens_can_be_drawn_and_whole_answers_are_their_text(ids: list[int], bits: int) -> None:
    new = tuple(at for at in range(len(ids)) if bits >> at & 1)
    text = _text(_pieces(ids, new))
    assert all(c.isprintable() or c == "\n" or ord(c) > 0x9F for c in text)
    whole = [token for token in ids if token != MASK]
    decoded = TOKENIZER.decode(whole, skip_special_tokens=True)
    assert _text(_pieces(whole, new)) == legible(decoded).replace("\t", "    ")
    assert sum(tokens for _, tokens in answer_parts(TOKENIZER, whole)) == len(whole)
    _text(_pieces(ids, new, "ascii")).encode("ascii")


def _sentencepiece() -> Tokenizer:
    """A tokenizer whose decoder takes a blank from whatever comes first, and puts bytes together."""
    words = ["▁a", "▁b", *(f"<0x{byte:02X}>" for byte in "€".encode())]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def test_blanks_between_tokens_stay_whatever_the_decoder_does_to_the_first() -> None:
    parts = answer_parts(_sentencepiece(), [0, 1, 2, 3, 4, 1])
    assert parts == [("a", 1), (" b", 1), ("€", 3), (" b", 1)]


def _record(ids: list[int], end: int, new: int) -> StepRecord:
    tokens = np.array([ids, [MASK] * len(ids)])
    transfer = np.zeros(tokens.shape, np.bool_)
    transfer[0, new] = True
    result = StepResult(tokens, np.ones(tokens.shape), None)
    return StepRecord(0, 0, 0, False, tokens, transfer, np.array([end, len(ids)]), result)


def test_what_is_behind_an_end_or_a_stop_is_not_drawn() -> None:
    ids = [*_ids("ab"), MASK, END, *_ids("c"), MASK]
    assert said(_record(ids, 6, 1), {END}) == (ids[:3], [False, True, False])
    assert said(_record(ids, 1, 0), {END}) == (ids[:1], [True])
    assert said(_record(ids, 6, 4), ()) == (ids, [False, False, False, False, True, False])


def test_lines_are_as_wide_as_the_terminal_at_most() -> None:
    assert [columns_of(c) for c in ("a", "漢", "🐶", "\u0301", "░", "\ufe0f")] == [1, 2, 2, 0, 1, 1]
    pieces = [Piece("ab漢", "said"), Piece("c漢e\u0301\n\nx", "new"), Piece("░░", "mask")]
    assert wrapped(pieces, 4) == [
        [("ab漢", "said")],
        [("c漢e\u0301", "new")],
        [],
        [("x", "new"), ("░░", "mask")],
    ]
    assert [_text(line) for line in wrapped(pieces, 1)] == ["a", "b", "漢", "c", "漢", "e\u0301", "", "x", "░", "░"]
    assert wrapped([], 4) == [[]]


@given(
    st.lists(st.tuples(st.text("ab\n漢🐶é\u0301", max_size=9), st.sampled_from(["said", "new", "mask"])), max_size=5),
    st.integers(2, 7),
)
def test_wrapping_loses_nothing(given_pieces: list[tuple[str, str]], columns: int) -> None:
    pieces = [Piece(*piece) for piece in given_pieces]  # type: ignore[arg-type]
    lines = wrapped(pieces, columns)
    assert all(sum(map(columns_of, _text(line))) <= columns for line in lines)
    assert "".join(map(_text, lines)) == _text(pieces).replace("\n", "")


def test_the_window_is_where_the_first_mask_is() -> None:
    lines = [[Piece("a", "said")] for _ in range(10)]
    assert window(lines[:3], 4) == slice(0, 4)
    assert window(lines, 4) == slice(6, 10)
    lines[5].append(Piece("░", "mask"))
    assert window(lines, 4) == slice(3, 7)
    lines[9].append(Piece("░", "mask"))
    assert window(lines, 4) == slice(3, 7)
    lines[0].append(Piece("░", "mask"))
    assert window(lines, 4) == slice(0, 4)
    assert window(lines, 0) == slice(0, 0)


def test_new_text_is_bold_also_without_colour() -> None:
    line = [Piece("a", "said"), Piece("b", "new"), Piece("░", "mask")]
    assert painted(line, colour=True) == "a\x1b[32m\x1b[1mb\x1b[0m\x1b[2m░\x1b[0m"
    assert painted(line, colour=False) == "a\x1b[1mb\x1b[0m\x1b[2m░\x1b[0m"


@pytest.mark.parametrize("above", [0, 1, 2, 4])
def test_frames_take_each_others_place_and_leave_nothing(above: int) -> None:
    """Wherever on the screen they begin, however high they are, and with lines as wide as it is, or wider."""
    screen = Screen(4, 4).feed("".join(f"{number}\r\n" for number in range(above)))
    before = [*screen.scrolled, *screen.lines]
    over = highest = 0
    for lines in (["abcd", "1/3"], ["x", "", "abcd", "2/3."], ["abcd"], ["漢字", "b"], ["漢字漢", "c"]):
        screen.feed(frame(lines, over))
        over, highest = len(lines), max(highest, len(lines))
        assert screen.lines[-over:] == ["漢漢" if line == "漢字漢" else line for line in lines]
        assert screen.scrolled == before[: max(0, above + highest - 4)]  # what had to make room, and none of ours
    screen.feed(cleared(over))
    assert [line for line in [*screen.scrolled, *screen.lines] if line] == before[:above]
    assert screen.wraps
