"""Single 112 px views with a label for every pooled token: the dense task that teaches the tower to see digits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .digits import Box, DigitBank, ink_digit
from .scenes import background, finish, ink_colour

VIEW = 112
CELLS = 8
"""Pooled tokens per side of a view."""

BACKGROUND = 10
IGNORED = -100

_GRIDS = ((1, 48.0, 84.0), (2, 32.0, 54.0), (3, 22.0, 38.0))
"""Ways to fill a view: slots per side, smallest and largest digit in pixels. The first looks like a tile of a scene,
the last like its thumbnail; the middle one keeps the two apart from being learned as two tasks."""

_CENTRES = (np.arange(CELLS) + 0.5) * (VIEW / CELLS)


def _label_cells(labels: NDArray[np.int64], box: Box, digit: int) -> None:
    """Write ``digit`` into the cells (8, 8) it covers; those its border runs through are ignored."""
    off_x = np.abs(_CENTRES - box.x)[None, :] / box.width
    off_y = np.abs(_CENTRES - box.y)[:, None] / box.height
    labels[(off_x < 0.7) & (off_y < 0.7) & (labels == BACKGROUND)] = IGNORED
    column = int(np.clip(box.x / (VIEW / CELLS), 0, CELLS - 1))
    row = int(np.clip(box.y / (VIEW / CELLS), 0, CELLS - 1))
    # The ink of an 8x8 digit mostly fills its height but only the middle of its width.
    labels[(off_x < 0.38) & (off_y < 0.46)] = digit
    labels[row, column] = digit


def make_view(rng: np.random.Generator, bank: DigitBank) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A view (112, 112, 3) uint8 and its labels (64,): a digit class, :data:`BACKGROUND` or :data:`IGNORED`."""
    canvas = background(rng, VIEW, VIEW)
    ink = ink_colour(rng)
    labels = np.full((CELLS, CELLS), BACKGROUND, np.int64)
    per_side, smallest, largest = _GRIDS[int(rng.integers(len(_GRIDS)))]
    # A long picture's thumbnail is squeezed to a square.
    squeeze_x, squeeze_y = 1.0, 1.0
    if rng.random() < 0.3:
        squeeze = rng.uniform(0.5, 1.0)
        squeeze_x, squeeze_y = (squeeze, 1.0) if rng.random() < 0.5 else (1.0, squeeze)
    slot = VIEW / per_side
    for row in range(per_side):
        for column in range(per_side):
            if rng.random() < 0.12:
                continue
            index = int(rng.integers(len(bank.labels)))
            side = rng.uniform(smallest, largest)
            width, height = side * squeeze_x * rng.uniform(0.85, 1.05), side * squeeze_y
            free_x, free_y = max(slot - width, 0) / 2, max(slot - height, 0) / 2
            box = Box(
                x=(column + 0.5) * slot + rng.uniform(-free_x, free_x),
                y=(row + 0.5) * slot + rng.uniform(-free_y, free_y),
                width=width,
                height=height,
            )
            digit = int(bank.labels[index])
            ink_digit(canvas, bank.images[index], box, ink, rng.uniform(-12, 12), rng.uniform(0.95, 1.35))
            _label_cells(labels, box, digit)
    pixels = finish(canvas)
    if rng.random() < 0.2:
        # Tiles of a picture that does not fill its canvas have a black margin at one edge.
        margin = int(rng.integers(7, 36))
        turned, turned_labels = np.rot90(pixels, k := int(rng.integers(4))), np.rot90(labels, k)
        turned[:margin] = 0
        covered = -(-margin * CELLS // VIEW)
        hidden = turned_labels[:covered]
        hidden[hidden != BACKGROUND] = IGNORED
    return pixels, labels.reshape(-1)


def make_views(rng: np.random.Generator, bank: DigitBank, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A batch of views (count, 112, 112, 3) uint8 and labels (count, 64) int64."""
    pairs = [make_view(rng, bank) for _ in range(count)]
    return np.stack([pixels for pixels, _ in pairs]), np.stack([labels for _, labels in pairs])
