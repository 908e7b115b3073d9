"""Where on its picture a visual token lies: as the packing takes it from the canvas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3tom_export.config import VisionConfig
from d3tom_export.families.llada_v import LLADA_V_8B
from d3tom_export.families.registry import read_config
from d3tom_export.pictures.canvas import Size, best_canvas, count_visual_tokens, fitted_size
from d3tom_export.pictures.places import TokenGrid, token_grids
from d3tom_export.pictures.views import packing
from tests.pictures.test_views import LAVIDA, TINY

_LLADA_V = read_config(LLADA_V_8B).vision
assert _LLADA_V is not None
SIZES = st.tuples(st.integers(8, 1600), st.integers(8, 1600))


def _centres(size: Size, config: VisionConfig) -> np.ndarray:
    """The middle of every visual token's rows of features on the picture, (V, 2) shares of its width and height.

    A newline's has none (NaN), nor has one that is taken from beyond the last row or column of the grid.
    """
    side, canvas = config.tokens_per_side, best_canvas(size, config.grid_pinpoints)
    packed, columns = packing(size, canvas, config), canvas[0] // config.image_size
    fitted = fitted_size(size, canvas)
    offset = [(whole - part) // 2 for whole, part in zip(canvas, fitted, strict=True)]
    found = np.full((packed.visual_tokens, 2), np.nan)
    for token, taps in enumerate(packed.rows):
        view, cell = np.divmod(taps, side**2)
        if view.max() > columns * (canvas[1] // config.image_size):
            continue
        down, along = np.divmod(cell, side)
        tile_down, tile_along = np.divmod(view - 1, columns)
        weights = np.ones(1) if packed.weights is None else packed.weights[token]
        place = np.array([(tile_along * side + along + 0.5) @ weights, (tile_down * side + down + 0.5) @ weights])
        if view[0] == 0:  # the whole picture in one view
            found[token] = np.array([along[0] + 0.5, down[0] + 0.5]) / side
        elif weights.max() < 1 or packed.weights is None:
            found[token] = (place * config.image_size / side - offset) / fitted
    return found


def _placed(grids: list[TokenGrid]) -> np.ndarray:
    """The same of ``grids``."""
    found = np.full((sum(grid.tokens for grid in grids), 2), np.nan)
    for grid in grids:
        for row in range(grid.rows):
            for column in range(grid.columns):
                place = (column + 0.5 - grid.left) / grid.width, (row + 0.5 - grid.top) / grid.height
                found[grid.token(row, column)] = place
    return found


@pytest.mark.parametrize("config", [LAVIDA, TINY, _LLADA_V], ids=["pooled", "tiny", "resized"])
@given(size=SIZES)
@settings(max_examples=15, deadline=None)
def test_tokens_lie_where_the_packing_takes_them_from(config: VisionConfig, size: Size) -> None:
    grids = token_grids(size, config)
    placed, centres = _placed(grids), _centres(size, config)
    assert len(placed) == len(centres) == count_visual_tokens(size, config)
    known = ~np.isnan(centres[:, 0])
    assert known.any()
    assert np.allclose(placed[known], centres[known], atol=2e-5)
    newlines = [grid.token(row, grid.columns) for grid in grids for row in grid.newlines]
    assert np.isnan(placed[newlines]).all()
    assert np.isnan(centres[newlines]).all()


def test_a_token_is_found_in_its_grid() -> None:
    whole, tiles = token_grids((224, 224), TINY)
    assert (whole.first, whole.tokens, whole.newlines) == (0, 4, ())
    assert (tiles.first, tiles.rows, tiles.columns, tiles.tokens) == (4, 4, 4, 20)
    assert [tiles.token(0, 0), tiles.token(0, 4), tiles.token(1, 0), tiles.token(3, 4)] == [4, 8, 9, 23]


def test_one_of_several_pictures_is_padded_to_a_square() -> None:
    (grid,) = token_grids((200, 100), LAVIDA, padded=True)
    assert grid.tokens == count_visual_tokens((200, 100), LAVIDA, padded=True)
    assert grid.newlines == (grid.rows - 1,)
    assert grid.token(grid.rows - 1, grid.columns) == grid.tokens - 1
    assert (grid.left, grid.width) == (0, grid.columns)
    assert (grid.top, grid.height) == (grid.rows / 4, grid.rows / 2)
