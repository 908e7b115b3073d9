"""What can be asked about a scene, and the right answer as text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scenes import Scene

KINDS = ("read", "count", "largest", "smallest", "place")

_PHRASES = {
    "read": ("Which digits do you see?", "Read the digits in the picture."),
    "count": ("How many digits do you see?", "Count the digits in the picture."),
    "largest": ("Which digit has the largest value?", "Name the largest digit in the picture."),
    "smallest": ("Which digit has the smallest value?", "Name the smallest digit in the picture."),
    "place": ("Which digit is {place}?", "Name the digit {place} of the picture."),
}

_PLACES = {
    (2, 2): ("at the top left", "at the top right", "at the bottom left", "at the bottom right"),
    (2, 1): ("on the left", "on the right"),
    (1, 2): ("at the top", "at the bottom"),
}
"""Names of a scene's slots, row by row, by (columns, rows)."""

NOTHING = "none"
"""The answer for an empty place."""


@dataclass(frozen=True)
class Question:
    """A question about one scene."""

    kind: str
    text: str
    answer: str


def _answer(kind: str, scene: Scene) -> str:
    digits = scene.digits
    if kind == "read":
        return " ".join(map(str, digits))
    return str({"count": len(digits), "largest": max(digits), "smallest": min(digits)}[kind])


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question:
    """A random question of ``kind`` about ``scene``; at most every third place asked about is empty."""
    phrase = _PHRASES[kind][int(rng.integers(2))]
    if kind != "place":
        return Question(kind, phrase, _answer(kind, scene))
    filled = [slot for slot, digit in enumerate(scene.slots) if digit is not None]
    empty = [slot for slot, digit in enumerate(scene.slots) if digit is None]
    slot = int(rng.choice(empty if empty and rng.random() < 0.3 else filled))
    place = _PLACES[scene.columns, scene.rows][slot]
    digit = scene.slots[slot]
    return Question(kind, phrase.format(place=place), NOTHING if digit is None else str(digit))


def all_texts() -> list[str]:
    """Every question that can be asked."""
    places = [place for names in _PLACES.values() for place in names]
    return [
        phrase.format(place=place)
        for phrases in _PHRASES.values()
        for phrase in phrases
        for place in (places if "{place}" in phrase else [""])
    ]
