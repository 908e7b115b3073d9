"""Where every pooled token of a picture's views lies on the picture, and what it should be called there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import VisionConfig
from d3tom_export.pictures.canvas import best_canvas, fitted_size

from .digits import Box
from .scenes import Scene
from .shapes import COLOURS, SHAPES

KINDS = (*map(str, range(10)), *SHAPES)
BACKGROUND = len(KINDS)
"""The label of a token with nothing on it, among kinds."""
NO_COLOUR = len(COLOURS)
"""The same among colours."""
ON_TILE = 3
"""The same among the thirds of rows and columns, of what only a tile shows."""
IGNORED = -100


class Cells(NamedTuple):
    """Pooled tokens of all views, flattened (views * T), on the picture that they were cut from."""

    x: NDArray[np.float64]
    """Their centres in pixels of the picture; beyond its edges where a canvas is padded."""
    y: NDArray[np.float64]
    width: NDArray[np.float64]
    """In pixels of the picture."""
    height: NDArray[np.float64]


@cache
def cells_of(size: tuple[int, int], config: VisionConfig) -> Cells:
    """The tokens of a picture of ``size`` (width, height): the thumbnail's, then the tiles' row by row."""
    side, view = config.tokens_per_side, config.image_size
    canvas = best_canvas(size, config.grid_pinpoints)
    fitted = fitted_size(size, canvas)
    centres = (np.arange(side) + 0.5) * (view / side)
    down, along = (axis.ravel() for axis in np.meshgrid(centres, centres, indexing="ij"))
    x, y = [along * size[0] / view], [down * size[1] / view]
    width, height = [np.full(side * side, size[0] / side)], [np.full(side * side, size[1] / side)]
    for top in range(0, canvas[1], view):
        for left in range(0, canvas[0], view):
            x.append((left + along - (canvas[0] - fitted[0]) // 2) * size[0] / fitted[0])
            y.append((top + down - (canvas[1] - fitted[1]) // 2) * size[1] / fitted[1])
            width.append(np.full(side * side, view / side * size[0] / fitted[0]))
            height.append(np.full(side * side, view / side * size[1] / fitted[1]))
    return Cells(*map(np.concatenate, (x, y, width, height)))


def covered(cells: Cells, box: Box, share: float) -> NDArray[np.bool_]:
    """Tokens whose centre lies in the middle ``share`` of ``box``: (views * T,) bool."""
    off_x, off_y = np.abs(cells.x - box.x), np.abs(cells.y - box.y)
    return (off_x < share * box.width / 2) & (off_y < share * box.height / 2)


def touched(cells: Cells, boxes: Sequence[Box]) -> NDArray[np.bool_]:
    """Tokens that show a good part of any of ``boxes``: (views * T,) bool."""
    touched = np.zeros(len(cells.x), np.bool_)
    for box in boxes:
        off_x, off_y = np.abs(cells.x - box.x), np.abs(cells.y - box.y)
        touched |= (off_x < (box.width + 0.4 * cells.width) / 2) & (off_y < (box.height + 0.4 * cells.height) / 2)
    return touched


class Labels(NamedTuple):
    """What every token should be called, (views * T,) int64 each; :data:`IGNORED` where it does not matter."""

    kind: NDArray[np.int64]
    """Its index in :data:`KINDS`, or :data:`BACKGROUND`; ignored at a thing's border."""
    colour: NDArray[np.int64]
    """Its index in :data:`shapes.COLOURS`, or :data:`NO_COLOUR`; ignored at a thing's border."""
    row: NDArray[np.int64]
    """In the thumbnail the third of the picture, from the top. What a tile shows is :data:`ON_TILE`, for where the tile
    lies its view does not tell; ignored where a tile shows nothing, which looks as in the thumbnail."""
    column: NDArray[np.int64]
    """The same from the left."""


def label_cells(scene: Scene, config: VisionConfig) -> Labels:
    """Labels of the tokens of ``scene``."""
    height, width, _ = scene.pixels.shape
    cells = cells_of((width, height), config)
    labels = np.empty((2, len(cells.x)), np.int64)
    labels[0], labels[1] = BACKGROUND, NO_COLOUR
    for thing in scene.things:
        off_x, off_y = np.abs(cells.x - thing.box.x), np.abs(cells.y - thing.box.y)
        near = (off_x < (thing.box.width + cells.width) / 2) & (off_y < (thing.box.height + cells.height) / 2)
        labels[:, near] = IGNORED
        # The ink of an 8x8 digit mostly fills its height but only the middle of its width.
        inside = (off_x < np.maximum(0.36 * thing.box.width, cells.width / 2)) & (
            off_y < np.maximum(0.42 * thing.box.height, cells.height / 2)
        )
        labels[0, inside] = KINDS.index(thing.kind)
        labels[1, inside] = list(COLOURS).index(thing.colour)
    side, per_view = config.tokens_per_side, config.tokens_per_view
    place = np.arange(per_view)
    on_tiles = np.where(np.isin(labels[0, per_view:], (BACKGROUND, IGNORED)), IGNORED, ON_TILE)
    row, column = (np.concatenate([third * 3 // side, on_tiles]) for third in (place // side, place % side))
    return Labels(labels[0], labels[1], row, column)
