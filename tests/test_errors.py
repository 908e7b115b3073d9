"""Messages: one paragraph that a terminal shows and does not obey, however strangers' names look."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.errors import D3tomError, listing, printable


def test_control_characters_are_shown_not_sent() -> None:
    error = D3tomError("tensor \x1b[2Jq\x07 is\nSelf-check passed: 2 answers\u202e")
    assert str(error) == r"tensor \x1b[2Jq\x07 is Self-check passed: 2 answers\u202e"


def test_long_messages_lose_their_middle() -> None:
    names = [f"{number:0100}" for number in range(10**5)]
    for text in (str(D3tomError(" ".join(names))), str(D3tomError(f"{listing(names)}; see the docs."))):
        assert len(text) < 4100
    assert "characters left out" in str(D3tomError("x" * 10_000 + " end"))
    assert str(D3tomError("x" * 10_000 + " end")).endswith(" end")
    assert listing(names, 2) == f"{names[0]}, {names[1]} and 99998 more"
    assert len(listing(["y" * 10_000])) < 300


@given(st.text(max_size=300))
def test_every_text_becomes_one_printable_line(text: str) -> None:
    line = printable(text)
    assert line.isprintable()
    assert "\n" not in line
