"""Half-denoised answers as lines of a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.cli.drawing import cleared, columns_of, frame, painted, window, wrapped
from d3tom_export.prompt.pieces import Piece
from tests.cli.screen import Screen


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


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
