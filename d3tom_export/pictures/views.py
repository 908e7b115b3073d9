"""Pictures in: anyres views for the tower, and the index that packs their features into visual tokens (lavida.md B).

Packing (dropping the canvas's padding, one newline vector per row, resizing what is too large) is an index computed
here, so that no graph has a picture's size in it. Imports neither torch nor a runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d3tom_export.config import VisionConfig
from d3tom_export.pictures.canvas import Size, best_canvas, fitted_size, resized_grid, unpadded_grid
from d3tom_export.progress import Note, no_note
from d3tom_export.trust.files import open_file
from d3tom_export.trust.images import decode_picture

PIXEL_MEAN = PIXEL_STD = 0.5
"""SigLIP's normalisation, the same for every channel."""


class Packing(NamedTuple):
    """Which feature rows each visual token is made of."""

    rows: NDArray[np.int64]
    """(V, taps): rows of the flattened (views * T) features; ``views * T`` stands for the newline."""
    weights: NDArray[np.float32] | None
    """(V, taps) that the rows are summed with; None: there is one tap, which is taken as it is."""

    @property
    def visual_tokens(self) -> int:
        """V."""
        return len(self.rows)


@dataclass(frozen=True)
class Views:
    """A picture cut for the tower."""

    pixel_values: NDArray[np.float32]
    """(views, 3, S, S): the thumbnail, then the tiles row by row."""
    packing: Packing


def open_picture(path: Path, *, ignore_orientation: bool = False, note: Note = no_note) -> Image.Image:
    """Decode a picture file to RGB: upright as its EXIF data say, or as stored with ``ignore_orientation``.

    Within Pillow's own limit of 179 megapixels it is what the release sees; a larger JPEG is decoded at a fraction of
    its size, and ``note`` hears of it (:mod:`d3tom_export.trust.images`). Raises :class:`D3tomError` where there is
    no file, or no picture in it.
    """
    with open_file(path) as file:
        return decode_picture(file, str(path), ignore_orientation=ignore_orientation, note=note)


def _pixels(view: Image.Image, side: int) -> NDArray[np.float32]:
    resized = view.resize((side, side), Image.Resampling.BICUBIC)
    values = np.asarray(resized, dtype=np.float32) * np.float32(1 / 255)
    return ((values - PIXEL_MEAN) / PIXEL_STD).transpose(2, 0, 1)


def _taps(size: int, resized: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The two rows that each of ``resized`` is between, of ``size``, and its share of the second: (resized,) each.

    Bilinear as torch's ``interpolate`` with ``align_corners=False`` and no antialias, in float32 as there.
    """
    scale = np.float32(size) / np.float32(resized)
    centre = (np.arange(resized, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    centre = np.maximum(centre, np.float32(0.0))
    first = centre.astype(np.int64)
    return first, np.minimum(first + 1, size - 1), (centre - first).astype(np.float32)


def resized(grid: NDArray[np.int64], rows: int, columns: int) -> Packing:
    """Taps and weights of ``grid`` (h, w) of feature rows resized to (rows, columns), flattened: four for each."""
    (above, below, down), (left, right, along) = _taps(grid.shape[0], rows), _taps(grid.shape[1], columns)
    corners = [grid[np.ix_(row, column)] for row in (above, below) for column in (left, right)]
    shares = [np.outer(u, v) for u in (1 - down, down) for v in (1 - along, along)]
    taps, weights = np.stack(corners, axis=-1).reshape(-1, 4), np.stack(shares, axis=-1).reshape(-1, 4)
    return Packing(taps, weights.astype(np.float32))


def packing(size: Size, canvas: Size, config: VisionConfig) -> Packing:
    """What each visual token of a picture is made of (``spatial_unpad``, lavida.md B5; "anyres_max_N").

    The thumbnail's T tokens come first, without newlines; then the tiles' grid without the canvas's padding, resized
    where the model has a limit and the grid exceeds it, row by row, each row closed by a newline.
    """
    side, per_view = config.tokens_per_side, config.tokens_per_view
    columns, rows = canvas[0] // config.image_size, canvas[1] // config.image_size
    tiles = per_view * (1 + np.arange(rows * columns)).reshape(rows, columns, 1, 1)
    cells = np.arange(per_view).reshape(1, 1, side, side)
    grid = (tiles + cells).transpose(0, 2, 1, 3).reshape(rows * side, columns * side)

    grid_height, grid_width, above, left = unpadded_grid(size, canvas, config)
    grid = grid[above : grid_height - above, left : grid_width - left]
    thumbnail, newline = np.arange(per_view), per_view * (1 + rows * columns)
    smaller = resized_grid(*grid.shape, config)
    if smaller is None:
        ends = np.full((grid.shape[0], 1), newline)
        whole = np.concatenate([thumbnail, np.concatenate([grid, ends], axis=1).ravel()])
        return Packing(whole.astype(np.int64)[:, None], None)
    height, width = smaller
    mixed, shares = resized(grid, height, width)
    assert shares is not None
    taps = np.full((height, width + 1, 4), newline)
    taps[:, :-1] = mixed.reshape(height, width, 4)
    weights = np.tile(np.array([1, 0, 0, 0], np.float32), (height, width + 1, 1))
    weights[:, :-1] = shares.reshape(height, width, 4)
    taps = np.concatenate([np.repeat(thumbnail[:, None], 4, axis=1), taps.reshape(-1, 4)])
    weights = np.concatenate([np.tile(weights[0, -1], (per_view, 1)), weights.reshape(-1, 4)])
    return Packing(taps.astype(np.int64), weights)


def prepare_picture(picture: Image.Image, config: VisionConfig) -> Views:
    """Views and packing of ``picture`` (lavida.md B1, B2, B5)."""
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    side = config.image_size
    canvas_size = best_canvas(picture.size, config.grid_pinpoints)
    fitted = fitted_size(picture.size, canvas_size)
    canvas = Image.new("RGB", canvas_size)
    offset = ((canvas_size[0] - fitted[0]) // 2, (canvas_size[1] - fitted[1]) // 2)
    canvas.paste(picture.resize(fitted, Image.Resampling.BICUBIC), offset)
    tiles = [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, canvas_size[1], side)
        for left in range(0, canvas_size[0], side)
    ]
    pixel_values = np.stack([_pixels(view, side) for view in (picture, *tiles)])
    return Views(pixel_values, packing(picture.size, canvas_size, config))


_PADDING = (127, 127, 127)
"""What a picture is padded with to a square: the mean colour that :data:`PIXEL_MEAN` stands for, as LLaVA has it."""


def prepare_padded(picture: Image.Image, config: VisionConfig) -> Views:
    """One view of ``picture`` in the middle of a square, whose T tokens one newline closes (spec-llada-v.md, 4).

    So LLaVA's "pad" shows pictures; LLaDA-V's evaluation switches to it where there are several.
    """
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    width, height = picture.size
    square = Image.new("RGB", (max(width, height),) * 2, _PADDING)
    square.paste(picture, ((square.width - width) // 2, (square.height - height) // 2))
    whole = np.arange(config.tokens_per_view + 1)[:, None]
    return Views(_pixels(square, config.image_size)[None], Packing(whole, None))


def pack_features(features: NDArray[np.float32], newline: NDArray[np.float32], packing: Packing) -> NDArray[np.float32]:
    """Visual tokens (V, D) from ``features`` (views, T, D), pooled where the model pools, and ``newline`` (D,)."""
    rows = np.concatenate([features.reshape(-1, features.shape[-1]), newline[None]])
    if packing.weights is None:
        return rows[packing.rows[:, 0]]
    # Tap by tap: no array of all four of every token.
    packed = np.zeros((packing.visual_tokens, rows.shape[-1]), np.float32)
    for tap, weights in zip(packing.rows.T, packing.weights.T, strict=True):
        packed += rows[tap] * weights[:, None]
    return packed
