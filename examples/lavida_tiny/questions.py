"""What can be asked about a scene, and the right answer as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .digits import Box
from .scenes import Scene, Thing
from .shapes import COLOURS, SHAPES

NAMING = ("place", "colour", "neighbour", "hue", "where")
"""Kinds that name one thing, so that looking at it is all that matters."""
LOCATED = ("read", "place", "neighbour", "where", "describe")
"""Kinds that ask or tell where things are, or their order."""
KINDS = ("read", "count", "largest", "smallest", *NAMING, "describe")

_PHRASES = {
    "read": ("Which digits do you see?", "Read the digits in the picture."),
    "count": ("How many digits do you see?", "Count the digits in the picture."),
    "largest": ("Which digit has the largest value?", "Name the largest digit in the picture."),
    "smallest": ("Which digit has the smallest value?", "Name the smallest digit in the picture."),
    "place": ("What is {place}?", "Name the thing {place} of the picture."),
    "colour": ("What is {colour}?", "Name the {colour} thing in the picture."),
    "neighbour": ("What is {side} the {thing}?", "Name the thing {side} the {thing}."),
    "hue": ("What colour is the {kind}?", "Name the colour of the {kind} in the picture."),
    "where": ("Where is the {thing}?", "Name the place of the {thing} in the picture."),
    "describe": ("What do you see?", "Describe the picture."),
}

_PLACES = {
    (3, 3): (
        "at the top left", "at the top", "at the top right",
        "on the left", "in the middle", "on the right",
        "at the bottom left", "at the bottom", "at the bottom right",
    ),
    (3, 1): ("on the left", "in the middle", "on the right"),
    (1, 3): ("at the top", "in the middle", "at the bottom"),
}  # fmt: skip
"""Names of a scene's places, row by row, by (columns, rows)."""

_SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Steps (column, row) from a thing to its neighbours."""

NOTHING = "none"
"""The answer for an empty place."""


@dataclass(frozen=True)
class Question:
    """A question about one scene."""

    kind: str
    text: str
    answer: str
    about: tuple[Box, ...]
    """Where the answer is to be seen, in pixels of the picture."""


def _of_all(kind: str, scene: Scene) -> tuple[str, tuple[Thing, ...]]:
    """The answer to a question about everything, and what it is about."""
    digits = scene.digits
    if kind == "describe":
        names = _PLACES[scene.columns, scene.rows]
        parts = [f"{thing.name} {name}" for thing, name in zip(scene.places, names, strict=True) if thing is not None]
        return ", ".join(parts) + ".", scene.things
    if kind == "read":
        return " ".join(thing.kind for thing in digits), digits
    values = [int(thing.kind) for thing in digits]
    return str({"count": len(values), "largest": max(values), "smallest": min(values)}[kind]), digits


def _pick(rng: np.random.Generator, filled: list[int], empty: list[int]) -> int:
    """A filled place, or at most every fourth time an empty one."""
    return int(rng.choice(empty if empty and (not filled or rng.random() < 0.25) else filled))


def _unique(scene: Scene, key: str) -> list[int]:
    """Places of things that no other thing on ``scene`` equals in ``key``: "kind", "colour" or "name"."""
    counts = Counter(getattr(thing, key) for thing in scene.things)
    return [place for place, thing in enumerate(scene.places) if thing is not None and counts[getattr(thing, key)] == 1]


def _neighbours(scene: Scene) -> tuple[list[tuple[int, str, int]], list[tuple[int, str, int]]]:
    """(place of a thing of its own name, side, place beside it), where there is a thing and where there is none."""
    filled, empty = [], []
    for place in _unique(scene, "name"):
        for side, (right, down) in _SIDES.items():
            column, row = place % scene.columns + right, place // scene.columns + down
            if 0 <= column < scene.columns and 0 <= row < scene.rows:
                beside = row * scene.columns + column
                (empty if scene.places[beside] is None else filled).append((place, side, beside))
    return filled, empty


def can_ask(scene: Scene, kind: str) -> bool:
    """Whether a question of ``kind`` has one right answer on ``scene``."""
    key = {"colour": "colour", "hue": "kind", "where": "name"}.get(kind)
    if key is not None:
        return bool(_unique(scene, key))
    return kind != "neighbour" or any(_neighbours(scene))


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question:
    """A random question of ``kind``, which ``scene`` must allow (:func:`can_ask`)."""
    phrase = _PHRASES[kind][int(rng.integers(2))]
    if kind not in NAMING:
        answer, things = _of_all(kind, scene)
        return Question(kind, phrase, answer, tuple(thing.box for thing in things))
    names = _PLACES[scene.columns, scene.rows]
    if kind == "place":
        filled = [place for place, thing in enumerate(scene.places) if thing is not None]
        empty = [place for place, thing in enumerate(scene.places) if thing is None]
        place = _pick(rng, filled, empty)
        thing = scene.places[place]
        box = scene.place_box(place) if thing is None else thing.box
        return Question(kind, phrase.format(place=names[place]), NOTHING if thing is None else thing.name, (box,))
    if kind == "neighbour":
        filled_pairs, empty_pairs = _neighbours(scene)
        pairs = filled_pairs + empty_pairs
        place, side, beside = pairs[
            _pick(rng, list(range(len(filled_pairs))), list(range(len(filled_pairs), len(pairs))))
        ]
        anchor, thing = scene.places[place], scene.places[beside]
        assert anchor is not None
        about = (anchor.box,) if thing is None else (anchor.box, thing.box)
        text = phrase.format(side=side, thing=anchor.name)
        return Question(kind, text, NOTHING if thing is None else thing.name, about)
    key = {"colour": "colour", "hue": "kind", "where": "name"}[kind]
    place = int(rng.choice(_unique(scene, key)))
    thing = scene.places[place]
    assert thing is not None
    answer = {"colour": thing.kind, "hue": thing.colour, "where": names[place]}[kind]
    return Question(kind, phrase.format(colour=thing.colour, kind=thing.kind, thing=thing.name), answer, (thing.box,))


def all_texts() -> list[str]:
    """Sentences that hold every word which is asked or answered."""
    texts = [*COLOURS, *SHAPES, NOTHING]
    places = [place for names in _PLACES.values() for place in names]
    for phrases in _PHRASES.values():
        for phrase in phrases:
            for place, side, colour, shape in zip(
                places, list(_SIDES) * 4, list(COLOURS) * 3, list(SHAPES) * 3, strict=False
            ):
                texts.append(
                    phrase.format(place=place, side=side, colour=colour, kind=shape, thing=f"{colour} {shape}")
                )
                texts.append(f"{colour} {shape} {place}, red 5 {place}.")
    return texts
