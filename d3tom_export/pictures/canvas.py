"""Which canvas a picture is laid on, and how many visual tokens it becomes: arithmetic on sizes (lavida.md B1, B5).

Imports neither numpy nor Pillow: commands that only count need none of them.
"""

from __future__ import annotations

import math

from d3tom_export.config import VisionConfig

Size = tuple[int, int]
"""(width, height) in pixels, as PIL has it."""


def best_canvas(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The canvas that shows most of a picture: largest effective resolution, then least waste, then the first."""
    width, height = size

    def rank(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]

    return max(pinpoints, key=rank)


def fitted_size(size: Size, canvas: Size) -> Size:
    """``size`` scaled to touch ``canvas`` from inside, keeping its aspect."""
    (width, height), (canvas_width, canvas_height) = size, canvas
    scale_width, scale_height = canvas_width / width, canvas_height / height
    if scale_width < scale_height:
        return canvas_width, min(math.ceil(height * scale_width), canvas_height)
    return min(math.ceil(width * scale_height), canvas_width), canvas_height


def unpadded_grid(size: Size, canvas: Size, config: VisionConfig) -> tuple[int, int, int, int]:
    """Rows and columns of the tiles' token grid, and the margins above and to the left that show no picture."""
    side = config.tokens_per_side
    grid_width, grid_height = canvas[0] // config.image_size * side, canvas[1] // config.image_size * side
    width, height = size
    if width / height > grid_width / grid_height:
        return grid_height, grid_width, (grid_height - int(height * (grid_width / width))) // 2, 0
    return grid_height, grid_width, 0, (grid_width - int(width * (grid_height / height))) // 2


_MUCH_LARGER = 1.1
"""How many times as high and wide as what ``max_views`` allows a grid may be and stay as it is ("anyres_max_N")."""


def resized_grid(rows: int, columns: int, config: VisionConfig) -> Size | None:
    """(rows, columns) that a picture's token grid without padding is resized to; None: it stays as it is.

    Source: LLaVA's "anyres_max_N" (spec-llada-v.md, 4).
    """
    if config.max_views is None:
        return None
    times = math.sqrt(rows * columns / (config.max_views * config.tokens_per_view))
    return (int(rows // times), int(columns // times)) if times > _MUCH_LARGER else None


def count_visual_tokens(size: Size, config: VisionConfig, *, padded: bool = False) -> int:
    """V of a picture of this size: as long as its :func:`~d3tom_export.pictures.views.packing`.

    ``padded`` is one of several that are shown as one view each.
    """
    if padded:
        return config.tokens_per_view + 1
    rows, columns, above, left = unpadded_grid(size, best_canvas(size, config.grid_pinpoints), config)
    rows, columns = rows - 2 * above, columns - 2 * left
    rows, columns = resized_grid(rows, columns, config) or (rows, columns)
    return config.tokens_per_view + rows * (columns + 1)
