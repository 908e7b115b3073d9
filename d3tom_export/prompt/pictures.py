"""Pictures in: anyres views for the tower, and the index that packs their features into visual tokens (lavida.md B).

Packing (dropping the canvas's padding, one newline vector per row) is an index vector computed here, so that no graph
has a picture's size in it. Imports neither torch nor a runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d3tom_export.config import VisionConfig
from d3tom_export.progress import Note, no_note
from d3tom_export.prompt.canvas import Size, best_canvas, fitted_size, unpadded_grid
from d3tom_export.trust.files import open_file
from d3tom_export.trust.images import decode_picture

PIXEL_MEAN = PIXEL_STD = 0.5
"""SigLIP's normalisation, the same for every channel."""


@dataclass(frozen=True)
class Views:
    """A picture cut for the tower."""

    pixel_values: NDArray[np.float32]
    """(views, 3, S, S): the thumbnail, then the tiles row by row."""
    packing: NDArray[np.int64]
    """(V,): each visual token's row in the flattened (views * T) features; ``views * T`` stands for the newline."""


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


def packing_index(size: Size, canvas: Size, config: VisionConfig) -> NDArray[np.int64]:
    """Which feature row each visual token takes: (V,) int64 (``spatial_unpad``, lavida.md B5).

    The thumbnail's T tokens come first, without newlines; then the tiles' grid without the canvas's padding, row by
    row, each row closed by a newline.
    """
    side, per_view = config.tokens_per_side, config.tokens_per_view
    columns, rows = canvas[0] // config.image_size, canvas[1] // config.image_size
    tiles = per_view * (1 + np.arange(rows * columns)).reshape(rows, columns, 1, 1)
    cells = np.arange(per_view).reshape(1, 1, side, side)
    grid = (tiles + cells).transpose(0, 2, 1, 3).reshape(rows * side, columns * side)

    grid_height, grid_width, above, left = unpadded_grid(size, canvas, config)
    grid = grid[above : grid_height - above, left : grid_width - left]
    newline = np.full((grid.shape[0], 1), per_view * (1 + rows * columns))
    return np.concatenate([np.arange(per_view), np.concatenate([grid, newline], axis=1).ravel()]).astype(np.int64)


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
    return Views(pixel_values, packing_index(picture.size, canvas_size, config))


def pack_features(
    features: NDArray[np.float32], newline: NDArray[np.float32], packing: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Visual tokens (V, D) from pooled ``features`` (views, T, D) and the ``newline`` vector (D,)."""
    rows = np.concatenate([features.reshape(-1, features.shape[-1]), newline[None]])
    return rows[packing]
