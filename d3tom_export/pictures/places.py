"""Where on its picture each visual token lies: for whoever shows which of them were kept, or attended to.

V visual tokens, T tokens of a view. Imports no framework.
"""

from __future__ import annotations

from dataclasses import dataclass

from d3tom_export.config import VisionConfig
from d3tom_export.pictures.canvas import Size, best_canvas, fitted_size, resized_grid, unpadded_grid


@dataclass(frozen=True)
class TokenGrid:
    """Visual tokens that lie side by side on a picture, row by row."""

    view: str
    """"whole" for the view that shows all of the picture at once, "tiles" for those that show it in pieces."""
    first: int
    """Of the V visual tokens, the one in the upper left corner."""
    rows: int
    columns: int
    newlines: tuple[int, ...]
    """The rows behind whose last token one more stands that closes them, and shows nothing."""
    left: float
    top: float
    width: float
    height: float
    """Where the picture lies, in columns and rows of the grid: beyond them the model sees the canvas's padding."""

    @property
    def tokens(self) -> int:
        """How many of the visual tokens are this grid's, newlines among them."""
        return self.rows * self.columns + len(self.newlines)

    def token(self, row: int, column: int) -> int:
        """Of the V visual tokens the one at a place; column ``columns`` is the newline's."""
        return self.first + row * self.columns + column + sum(1 for closed in self.newlines if closed < row)


def token_grids(size: Size, config: VisionConfig, *, padded: bool = False) -> list[TokenGrid]:
    """The grids of a picture of this size, in the order of :func:`~d3tom_export.pictures.views.packing`.

    Together they have the picture's V tokens (:func:`~d3tom_export.pictures.canvas.count_visual_tokens`). ``padded`` is
    one of several that are shown as one view each.
    """
    side = config.tokens_per_side
    if padded:
        longest = max(size)
        width, height = (side * length / longest for length in size)
        return [TokenGrid("whole", 0, side, side, (side - 1,), (side - width) / 2, (side - height) / 2, width, height)]
    whole = TokenGrid("whole", 0, side, side, (), 0.0, 0.0, float(side), float(side))
    canvas = best_canvas(size, config.grid_pinpoints)
    all_rows, all_columns, above, before = unpadded_grid(size, canvas, config)
    rows, columns = all_rows - 2 * above, all_columns - 2 * before
    shown_rows, shown_columns = resized_grid(rows, columns, config) or (rows, columns)
    down, along = shown_rows / max(rows, 1), shown_columns / max(columns, 1)  # of a very narrow picture none is left
    down, along = down or 1.0, along or 1.0
    fitted = fitted_size(size, canvas)
    offset = ((canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2)
    across, high = all_columns / canvas[0], all_rows / canvas[1]  # tokens a pixel
    tiles = TokenGrid(
        "tiles",
        whole.tokens,
        shown_rows,
        shown_columns,
        tuple(range(shown_rows)),
        (offset[0] * across - before) * along,
        (offset[1] * high - above) * down,
        fitted[0] * across * along,
        fitted[1] * high * down,
    )
    return [whole, tiles]
