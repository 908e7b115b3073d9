"""Seeded scenes of a few small digits and shapes among distractors, and the pixels behind them.

A scene divides its picture into places (3x3 for most shapes, 3x1 or 1x3 for long ones) and puts at most one thing in
each, so that its reading order, row by row, is never ambiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .digits import Box, DigitBank, ink_digit
from .shapes import COLOURS, SHAPES, ink_shape

CANVAS = 448
"""Side of the square canvas of 2x2 views; sizes of things are meant on it."""

NATIVE_SIZE = (CANVAS, CANVAS)
OTHER_SIZES = ((448, 224), (224, 448), (448, 336), (336, 448), (600, 400), (400, 600), (320, 240), (640, 640))
"""(width, height) of the pictures beside the square ones of :data:`NATIVE_SIZE`."""
LONG_SIZES = OTHER_SIZES[:2]
"""Those of two views, whose visual tokens are the fewest."""

SMALLEST, LARGEST = 44.0, 60.0
"""Sizes of things in pixels of the 448 px canvas: three or four visual tokens high and wide, in all a twentieth."""
FEWEST_THINGS, MOST_THINGS, MOST_OF_A_SORT = 2, 6, 3
"""Things on a scene, and how many of them may be digits, or shapes."""

_LEVELS = 8
"""Pixels are rounded to multiples of this, which costs nothing to the eye and keeps PNGs of scenes small."""


@dataclass(frozen=True)
class Thing:
    """A digit or a shape."""

    kind: str
    """"0" to "9", or one of :data:`shapes.SHAPES`."""
    colour: str
    """One of :data:`shapes.COLOURS`."""
    box: Box
    """In pixels of the picture."""

    @property
    def is_digit(self) -> bool:
        return self.kind.isdigit()

    @property
    def name(self) -> str:
        """Such as "red 5"."""
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """One picture and what is on it."""

    pixels: NDArray[np.uint8]
    """(H, W, 3)"""
    columns: int
    rows: int
    places: tuple[Thing | None, ...]
    """What is in each place, row by row."""

    @property
    def things(self) -> tuple[Thing, ...]:
        """In reading order."""
        return tuple(thing for thing in self.places if thing is not None)

    @property
    def digits(self) -> tuple[Thing, ...]:
        """The digits, in reading order; every scene has one."""
        return tuple(thing for thing in self.things if thing.is_digit)

    def place_box(self, place: int) -> Box:
        """The middle of a place, as large as a thing."""
        height, width, _ = self.pixels.shape
        side = SMALLEST * max(width, height) / CANVAS
        x, y = (place % self.columns + 0.5) * width / self.columns, (place // self.columns + 0.5) * height / self.rows
        return Box(x, y, side, side)


def background(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    """A light linear gradient: (H, W, 3) float32 in 0..255."""
    start = rng.uniform(185, 250, 3).astype(np.float32)
    stop = np.clip(start + rng.uniform(-25, 25, 3), 180, 255).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :]
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    mix = np.clip(0.5 + 0.7 * (np.cos(angle) * x + np.sin(angle) * y), 0, 1).astype(np.float32)[..., None]
    return start + (stop - start) * mix


def ink_colour(rng: np.random.Generator, colour: str) -> NDArray[np.float32]:
    """A shade of ``colour``: (3,) float32."""
    return np.clip(np.array(COLOURS[colour], np.float32) + rng.uniform(-18, 18, 3).astype(np.float32), 0, 255)


def scatter_distractors(rng: np.random.Generator, canvas: NDArray[np.float32], scale: float) -> None:
    """Draw 6 to 14 thin strokes and small dots, grey or coloured, into ``canvas`` (H, W, 3), in place."""
    height, width, _ = canvas.shape
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(6, 15))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        if rng.random() < 0.4:
            red, green, blue = ink_colour(rng, list(COLOURS)[int(rng.integers(len(COLOURS)))])
        else:
            red = green = blue = rng.uniform(90, 170)
        ink = (int(red), int(green), int(blue))
        if rng.random() < 0.5:
            reach = rng.uniform(2, 5) * scale
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=ink)
        else:
            angle, reach = rng.uniform(0, np.pi), rng.uniform(8, 22) * scale
            along, down = reach * np.cos(angle), reach * np.sin(angle)
            draw.line((x - along, y - down, x + along, y + down), fill=ink, width=max(1, round(2 * scale)))
    canvas[:] = np.asarray(image, np.float32)


def finish(canvas: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round a picture in the making to the 8-bit values it is stored with."""
    return (np.clip(np.round(canvas / _LEVELS) * _LEVELS, 0, 255)).astype(np.uint8)


def place_grid(width: int, height: int) -> tuple[int, int]:
    """(columns, rows) of places in a picture of this size."""
    if width >= 1.75 * height:
        return 3, 1
    if height >= 1.75 * width:
        return 1, 3
    return 3, 3


def _kinds(rng: np.random.Generator, count: int, places: int) -> list[str | None]:
    """What ``count`` things are (None: a digit), in random order: digits and shapes, at least one a digit."""
    if count > FEWEST_THINGS * MOST_OF_A_SORT:  # a crowd, for the dense phase
        return [None if rng.random() < 0.75 else SHAPES[int(rng.integers(len(SHAPES)))] for _ in range(count)]
    fewest, most = max(1, count - MOST_OF_A_SORT), min(count, MOST_OF_A_SORT)
    digits = int(rng.integers(fewest, most + 1))
    kinds = [None] * digits + [SHAPES[int(rng.integers(len(SHAPES)))] for _ in range(count - digits)]
    return [kinds[index] for index in rng.permutation(count)]


def make_scene(
    rng: np.random.Generator,
    bank: DigitBank,
    size: tuple[int, int] = NATIVE_SIZE,
    things: int | None = None,
    grid: tuple[int, int] | None = None,
) -> Scene:
    """A random scene of ``size`` (width, height) with ``things`` things, or two to six; digits are of ``bank``.

    ``grid`` (columns, rows) has places of another number than questions know names for.
    """
    width, height = size
    columns, rows = place_grid(width, height) if grid is None else grid
    count = columns * rows
    if things is None:
        things = int(rng.integers(FEWEST_THINGS, MOST_THINGS + 1))
    things = min(things, count)
    # Sizes are meant on the canvas the model sees: a picture is scaled to its longer side there.
    scale = max(width, height) / CANVAS
    canvas = background(rng, width, height)
    scatter_distractors(rng, canvas, scale)
    place_width, place_height = width / columns, height / rows
    places: list[Thing | None] = [None] * count
    for place, kind in zip(rng.choice(count, size=things, replace=False), _kinds(rng, things, count), strict=True):
        side = rng.uniform(SMALLEST, LARGEST) * scale
        box_width = side * (rng.uniform(0.85, 1.0) if kind is None else rng.uniform(0.7, 0.8))
        box_height = side if kind is None else box_width
        free_x, free_y = (0.94 * place_width - box_width) / 2, (0.94 * place_height - box_height) / 2
        box = Box(
            x=(place % columns + 0.5) * place_width + rng.uniform(-free_x, free_x),
            y=(place // columns + 0.5) * place_height + rng.uniform(-free_y, free_y),
            width=box_width,
            height=box_height,
        )
        colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        ink = ink_colour(rng, colour)
        if kind is None:
            index = int(rng.integers(len(bank.labels)))
            ink_digit(canvas, bank.images[index], box, ink, rng.uniform(-8, 8), rng.uniform(1.1, 1.5))
            kind = str(int(bank.labels[index]))
        else:
            ink_shape(canvas, kind, box, ink, rng.uniform(-8, 8))
        places[place] = Thing(kind, colour, box)
    return Scene(finish(canvas), columns, rows, tuple(places))


def random_size(rng: np.random.Generator, square_share: float = 0.75) -> tuple[int, int]:
    """(width, height): 448x448 with probability ``square_share``, else one of the other sizes."""
    if rng.random() < square_share:
        return NATIVE_SIZE
    return OTHER_SIZES[int(rng.integers(len(OTHER_SIZES)))]
