"""Pictures in: anyres views for the tower, and the index that packs their features into visual tokens (lavida.md B).

Packing (dropping the canvas's padding, one newline vector per row) is an index vector computed here, so that no graph
has a picture's size in it. Imports neither torch nor a runtime.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from d3tom_export.config import VisionConfig
from d3tom_export.errors import D3tomError

PIXEL_MEAN = PIXEL_STD = 0.5
"""SigLIP's normalisation, the same for every channel."""

Size = tuple[int, int]
"""(width, height) in pixels, as PIL has it."""


@dataclass(frozen=True)
class Views:
    """A picture cut for the tower."""

    pixel_values: NDArray[np.float32]
    """(views, 3, S, S): the thumbnail, then the tiles row by row."""
    packing: NDArray[np.int64]
    """(V,): each visual token's row in the flattened (views * T) features; ``views * T`` stands for the newline."""


def open_picture(path: Path) -> Image.Image:
    """Decode a picture file to RGB. Raises :class:`D3tomError` where there is none or it is not a picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                return _to_rgb(picture)
    except FileNotFoundError:
        raise D3tomError(f"Picture {path} does not exist. --image takes the path of a picture file.") from None
    except UnidentifiedImageError:
        raise D3tomError(
            f"{path} is not a picture that can be decoded, whatever its name ends in. "
            "Give a PNG, JPEG, WebP, BMP or another file that Pillow reads."
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise D3tomError(f"Picture {path} is damaged or unreadable: {error}. Save it again or give another.") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    """RGB, 8 bits a channel; deeper grey is scaled where Pillow's own conversion would clip it to white."""
    if picture.mode.startswith("I;16") or picture.mode == "I":
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its grey values exceed 16 bits")
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


def best_canvas(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The canvas that shows most of a picture: largest effective resolution, then least waste, then the first."""
    width, height = size

    def rank(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]

    return max(pinpoints, key=rank)


def _fit(size: Size, canvas: Size) -> Size:
    """``size`` scaled to touch ``canvas`` from inside, keeping its aspect."""
    (width, height), (canvas_width, canvas_height) = size, canvas
    scale_width, scale_height = canvas_width / width, canvas_height / height
    if scale_width < scale_height:
        return canvas_width, min(math.ceil(height * scale_width), canvas_height)
    return min(math.ceil(width * scale_height), canvas_width), canvas_height


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

    width, height = size
    grid_height, grid_width = grid.shape
    if width / height > grid_width / grid_height:
        margin = (grid_height - int(height * (grid_width / width))) // 2
        grid = grid[margin : grid_height - margin]
    else:
        margin = (grid_width - int(width * (grid_height / height))) // 2
        grid = grid[:, margin : grid_width - margin]
    newline = np.full((grid.shape[0], 1), per_view * (1 + rows * columns))
    return np.concatenate([np.arange(per_view), np.concatenate([grid, newline], axis=1).ravel()]).astype(np.int64)


def prepare_picture(picture: Image.Image, config: VisionConfig) -> Views:
    """Views and packing of ``picture`` (lavida.md B1, B2, B5)."""
    picture = picture.convert("RGB")
    side = config.image_size
    canvas_size = best_canvas(picture.size, config.grid_pinpoints)
    fitted = _fit(picture.size, canvas_size)
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
