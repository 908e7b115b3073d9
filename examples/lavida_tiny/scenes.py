"""Seeded scenes of one to four handwritten digits on a plain background, and the pixels behind them.

A scene divides its picture into slots (2x2 for most shapes, 2x1 or 1x2 for long ones) and puts at most one digit in
each, so that its reading order, row by row, is never ambiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .digits import Box, DigitBank, ink_digit

CANVAS = 224
"""Side of the square canvas of 2x2 views; digit sizes are meant on it."""

NATIVE_SIZE = (CANVAS, CANVAS)
OTHER_SIZES = ((224, 112), (112, 224), (224, 168), (168, 224), (300, 200), (200, 300), (160, 120), (320, 320))
"""(width, height) of the pictures beside the square ones of :data:`NATIVE_SIZE`."""

SMALLEST_DIGIT, LARGEST_DIGIT = 48.0, 80.0
"""Digit sizes in pixels of the 224 px canvas: large, so that a digit covers many visual tokens."""

_LEVELS = 8
"""Pixels are rounded to multiples of this, which costs nothing to the eye and keeps PNGs of scenes small."""


@dataclass(frozen=True)
class Scene:
    """One picture and what is on it."""

    pixels: NDArray[np.uint8]
    """(H, W, 3)"""
    columns: int
    rows: int
    slots: tuple[int | None, ...]
    """The digit in each slot, row by row, or None."""

    @property
    def digits(self) -> tuple[int, ...]:
        """The digits present, in reading order."""
        return tuple(digit for digit in self.slots if digit is not None)


def background(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    """A light linear gradient with a faint coarse texture: (H, W, 3) float32 in 0..255."""
    start = rng.uniform(170, 250, 3).astype(np.float32)
    stop = np.clip(start + rng.uniform(-30, 30, 3), 165, 255).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :]
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    mix = np.clip(0.5 + 0.7 * (np.cos(angle) * x + np.sin(angle) * y), 0, 1).astype(np.float32)[..., None]
    pixels = start + (stop - start) * mix
    cell = 16
    coarse = rng.normal(0, rng.uniform(0, 4), (-(-height // cell), -(-width // cell))).astype(np.float32)
    texture = coarse.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
    return pixels + texture[..., None]


def ink_colour(rng: np.random.Generator) -> NDArray[np.float32]:
    """A dark colour: (3,) float32."""
    return rng.uniform(0, 85, 3).astype(np.float32)


def finish(canvas: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round a picture in the making to the 8-bit values it is stored with."""
    return (np.clip(np.round(canvas / _LEVELS) * _LEVELS, 0, 255)).astype(np.uint8)


def slot_grid(width: int, height: int) -> tuple[int, int]:
    """(columns, rows) of slots in a picture of this size."""
    if width >= 1.75 * height:
        return 2, 1
    if height >= 1.75 * width:
        return 1, 2
    return 2, 2


def make_scene(
    rng: np.random.Generator, bank: DigitBank, size: tuple[int, int] = NATIVE_SIZE, most_digits: int = 4
) -> Scene:
    """A random scene of ``size`` (width, height) with one to ``most_digits`` digits of ``bank``."""
    width, height = size
    columns, rows = slot_grid(width, height)
    canvas = background(rng, width, height)
    ink = ink_colour(rng)
    count = int(rng.integers(1, min(most_digits, columns * rows) + 1))
    taken = rng.choice(columns * rows, size=count, replace=False)
    slots: list[int | None] = [None] * (columns * rows)
    # Sizes are meant on the canvas the model sees: a picture is scaled to its longer side there.
    scale = max(width, height) / CANVAS
    slot_width, slot_height = width / columns, height / rows
    for slot in taken:
        index = int(rng.integers(len(bank.labels)))
        largest = min(LARGEST_DIGIT * scale, 0.92 * min(slot_width, slot_height))
        side = rng.uniform(SMALLEST_DIGIT * scale, largest)
        box_width, box_height = side * rng.uniform(0.9, 1.0), side
        free_x, free_y = (slot_width - box_width) / 2, (slot_height - box_height) / 2
        box = Box(
            x=(slot % columns + 0.5) * slot_width + rng.uniform(-free_x, free_x),
            y=(slot // columns + 0.5) * slot_height + rng.uniform(-free_y, free_y),
            width=box_width,
            height=box_height,
        )
        ink_digit(canvas, bank.images[index], box, ink, rng.uniform(-8, 8), rng.uniform(1.0, 1.3))
        slots[slot] = int(bank.labels[index])
    return Scene(finish(canvas), columns, rows, tuple(slots))


def random_size(rng: np.random.Generator, square_share: float = 0.75) -> tuple[int, int]:
    """(width, height): 224x224 with probability ``square_share``, else one of the other sizes."""
    if rng.random() < square_share:
        return NATIVE_SIZE
    return OTHER_SIZES[int(rng.integers(len(OTHER_SIZES)))]
