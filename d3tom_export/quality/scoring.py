"""Whether an answer is right: exact match after normalisation, and ANLS. Imports nothing but the standard library.

Normalisation is that of question answering (SQuAD's script), with numbers left whole: Unicode's compatibility forms
(NFKC), case folded, punctuation and symbols gone but for a sign before a number or its currency, a point that begins a
number and what stands between two digits (commas of thousands go), the articles a, an and the gone unless nothing else
is left, white space collapsed. What is nothing but symbols stays as it is.

ANLS is the average normalised Levenshtein similarity (Biten et al., arXiv 1905.13648), as DocVQA's script and lmms-eval
take it: 1 minus the edit distance over the longer length, 0 where that is below a half; the best of several answers;
case folded. (By the paper's formula exactly a half is 0, too.)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from d3tom_export.errors import D3tomError

Metric = Literal["exact-match", "anls"]

_ARTICLES = frozenset(("a", "an", "the"))
_SIGNS = ("+", "-", "\u2212")
_SIGNED_CURRENCY = re.compile("(?<=[-+\u2212])[$\u00a2-\u00a5\u20a0-\u20c0](?=[.]?\\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
ANLS_THRESHOLD = 0.5
"""Similarity below which an answer counts nothing."""


def normalized(text: str) -> str:
    """``text`` as exact match compares it."""
    folded = _THOUSANDS.sub("", unicodedata.normalize("NFKC", text).casefold())
    folded = _SIGNED_CURRENCY.sub("", folded)
    kept = []
    for at, character in enumerate(folded):
        before, after = folded[at - 1 : at] if at else "", folded[at + 1 : at + 2]
        # A point that begins a number, not the last of several.
        pointed = (folded[at + 1 : at + 3] if character in _SIGNS else folded[at : at + 2]).partition(".")
        points = not pointed[0] and bool(pointed[1]) and pointed[2].isdigit()
        if unicodedata.category(character)[0] not in "PS":
            kept.append(character)
        elif character in _SIGNS and (after.isdigit() or points) and not before.isalnum():
            kept.append("+" if character == "+" else "-")
        elif (points and before != "." and not before.isalnum()) or (before.isdigit() and after.isdigit()):
            kept.append(character)
        elif not (before.isalnum() and after.isalnum()) or character == "/" or unicodedata.category(character) == "Pd":
            kept.append(" ")
    words = "".join(kept).split() or folded.split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def edit_distance(one: str, other: str, most: int) -> int:
    """Insertions, deletions and replacements between two texts; ``most + 1`` where there are more than ``most``."""
    if abs(len(one) - len(other)) > most:
        return most + 1
    row = list(range(len(other) + 1))
    for at, character in enumerate(one, 1):
        above, row = row, [at]
        for place, wanted in enumerate(other):
            row.append(min(above[place] + (character != wanted), above[place + 1] + 1, row[place] + 1))
        if min(row) > most:
            return most + 1
    return min(row[-1], most + 1)


def anls(text: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity of ``text`` to the closest of ``answers``, 0 below a half."""
    said = " ".join(text.casefold().split())
    best = 0.0
    for answer in answers:
        right = " ".join(answer.casefold().split())
        longest = max(len(said), len(right))
        most = int((1.0 - ANLS_THRESHOLD) * longest)
        distance = edit_distance(said, right, most)
        share = distance / longest if longest else 0.0
        best = max(best, 1.0 - share if 1.0 - share >= ANLS_THRESHOLD else 0.0)
    return best


@dataclass(frozen=True)
class Scoring:
    """How answers are scored."""

    pattern: str | None = None
    """A regular expression: what it finds in an answer, or the first of its groups that took part, is what is
    compared. An answer in which it finds nothing is wrong."""
    normalize: bool = True
    """Whether exact match normalises both sides (:func:`normalized`); else it compares them letter for letter."""

    def __post_init__(self) -> None:
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise D3tomError(
                    f"--match {self.pattern!r} is no regular expression: {error}. Quote it for the shell, and escape "
                    "what is meant literally with a backslash."
                ) from None

    def said(self, text: str) -> str | None:
        """What of an answer's ``text`` is compared; None where the pattern finds nothing."""
        if self.pattern is None:
            return text
        found = re.search(self.pattern, text)
        if found is None:
            return None
        return next((group for group in found.groups() if group is not None), found.group())

    def exact(self, text: str, answers: Sequence[str]) -> bool:
        """Whether an answer is one of ``answers``."""
        said = self.said(text)
        if said is None:
            return False
        if not self.normalize:
            return said in answers
        return normalized(said) in {normalized(answer) for answer in answers}

    def score(self, metric: Metric, text: str, answers: Sequence[str]) -> float:
        """From 0 to 1."""
        if metric == "exact-match":
            return float(self.exact(text, answers))
        said = self.said(text)
        return 0.0 if said is None else anls(said, answers)
