"""Exact match after normalisation, ANLS, and what a pattern picks out of an answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3tom_export.errors import D3tomError
from d3tom_export.quality.scoring import Scoring, anls, edit_distance, normalized

WORDS = st.text(alphabet="abc -.,'é7", max_size=12)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The Cat.", "cat"),
        ("  a   dog ", "dog"),
        ("A", "a"),
        ("A.", "a"),
        ("don't", "dont"),
        ("e-mail", "e mail"),
        ("3.5", "3.5"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("1,000,000", "1000000"),
        ("3, 3", "3 3"),
        ("3,3", "3,3"),
        ("12:30", "12:30"),
        ("$5", "5"),
        (".5", ".5"),
        ("It is .5.", "it is .5"),
        ("-.5", "-.5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\u2212€.5", "-.5"),
        ("...5", "5"),
        ("v.5", "v5"),
        ("ﬁ", "fi"),
        ("+", "+"),
        ("the", "the"),
        ("", ""),
    ],
)
def test_normalisation(text: str, same: str) -> None:
    assert normalized(text) == same


def test_what_normalisation_keeps_apart() -> None:
    for one, other in (
        ("5", "-5"),
        (".5", "5"),
        ("-.5", "5"),
        ("-$5", "5"),
        ("3.5", "35"),
        ("+", "-"),
        ("a", "the"),
        ("3,3", "33"),
    ):
        assert normalized(one) != normalized(other)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_normalisation_is_done_once(text: str) -> None:
    once = normalized(text)
    assert once == " ".join(once.split())
    assert Scoring().exact(text, [text])


@settings(deadline=None)
@given(WORDS, WORDS, WORDS)
def test_edit_distance_is_a_distance(one: str, other: str, third: str) -> None:
    far = 100
    distance = edit_distance(one, other, far)
    assert distance == edit_distance(other, one, far)
    assert (distance == 0) == (one == other)
    assert abs(len(one) - len(other)) <= distance <= max(len(one), len(other))
    assert edit_distance(one, third, far) <= distance + edit_distance(other, third, far)
    for most in range(4):
        assert edit_distance(one, other, most) == min(distance, most + 1)


@settings(deadline=None)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=4))
def test_anls_is_the_best_of_several_answers(text: str, answers: list[str]) -> None:
    score = anls(text, answers)
    assert score == max(anls(text, [answer]) for answer in answers)
    assert score == 0 or 0.5 <= score <= 1
    assert anls(text, [*answers, text.upper()]) == 1


def test_anls_as_defined() -> None:
    assert anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert anls("abcd", ["abxy"]) == 0.5  # a half of it is wrong, as DocVQA's script and lmms-eval count it
    assert anls("abc", ["abxyz"]) == 0
    assert anls("  New   York", ["new york"]) == 1
    assert anls("", ["x"]) == 0
    assert anls("", [""]) == 1


def test_any_of_several_answers_is_right() -> None:
    assert Scoring().exact("Two.", ["2", "two"])
    assert not Scoring(normalize=False).exact("Two.", ["2", "two"])
    assert Scoring(normalize=False).exact("two", ["2", "two"])


def test_a_pattern_picks_what_is_compared() -> None:
    grouped = Scoring(r"answer is (\w+)")
    assert grouped.exact("I think the answer is B.", ["b"])
    assert not grouped.exact("B", ["B"])
    assert grouped.score("anls", "B", ["B"]) == 0
    assert Scoring(r"[A-D]").exact("(C) because", ["C"])
    assert Scoring(r"(x)?[A-D]").exact("C", ["C"])  # its group took no part: all that it found
    either = Scoring(r"(\d+)|none|only (\w+)")
    assert [either.said(text) for text in ("about 12", "none", "only one", "?")] == ["12", "none", "one", None]
    assert grouped.score("exact-match", "answer is B", ["b"]) == 1.0
    with pytest.raises(D3tomError, match=r"is no regular expression: .*Quote it for the shell"):
        Scoring("(")
