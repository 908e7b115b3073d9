"""Anyres views and packing against the figures derived from the original (lavida.md B5) and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from d3tom_export.config import VisionConfig
from d3tom_export.errors import D3tomError
from d3tom_export.families.llada import LLADA_8B
from d3tom_export.families.registry import read_config
from d3tom_export.pictures.canvas import best_canvas
from d3tom_export.pictures.views import Packing, open_picture, pack_features, packing, prepare_picture

PINPOINTS = [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]]
PIPELINE = {
    "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_mode": "bilinear",
}  # fmt: skip


def _eyes(fields: dict[str, Any]) -> VisionConfig:
    vision = read_config({**LLADA_8B, **PIPELINE, **fields}).vision
    assert vision is not None
    return vision


LAVIDA = _eyes({"mm_vision_tower": "google/siglip-so400m-patch14-384", "image_grid_pinpoints": PINPOINTS})
TINY_TOWER = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1,
    "image_size": 8, "patch_size": 2,
}  # fmt: skip
TINY = _eyes({"vision_config": TINY_TOWER, "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]})


@pytest.mark.parametrize(
    ("size", "canvas", "visual_tokens"),
    [
        ((512, 512), (768, 768), 1008),
        ((640, 480), (768, 768), 834),
        ((480, 640), (768, 768), 840),
        ((1280, 720), (768, 384), 660),
        ((720, 1280), (384, 768), 672),
        ((384, 384), (384, 768), 406),
        ((400, 300), (768, 384), 462),
        ((700, 350), (768, 384), 602),
        ((300, 1000), (384, 1152), 742),
        ((1000, 300), (1152, 384), 712),
        ((2000, 500), (1152, 384), 626),
    ],
)
def test_canvas_and_visual_tokens_are_the_originals(
    size: tuple[int, int], canvas: tuple[int, int], visual_tokens: int
) -> None:
    assert LAVIDA.tokens_per_view == 196
    found = best_canvas(size, LAVIDA.grid_pinpoints)
    index = packing(size, found, LAVIDA).rows[:, 0]
    assert len(index) == visual_tokens
    # 1280x720 and the like leave the choice of canvas to the count above; the squares pin it down.
    if size[0] == size[1]:
        assert found == canvas


def test_packing_reads_tiles_row_by_row_and_closes_rows_with_a_newline() -> None:
    # One 8 px view gives 4x4 patches, pooled to 2x2 tokens; 2x2 tiles follow the thumbnail (rows 0..3).
    index = packing((16, 16), (16, 16), TINY).rows[:, 0]
    newline = 5 * 4
    assert index.tolist() == [
        *range(4),
        *(4, 5, 8, 9, newline),
        *(6, 7, 10, 11, newline),
        *(12, 13, 16, 17, newline),
        *(14, 15, 18, 19, newline),
    ]  # fmt: skip


def test_unpad_cuts_the_canvas_margins() -> None:
    wide = packing((16, 8), (16, 16), TINY).rows[:, 0]  # half the rows are margin
    assert wide.tolist() == [0, 1, 2, 3, 6, 7, 10, 11, 20, 12, 13, 16, 17, 20]


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_packing_stays_inside_the_features_for_any_picture(width: int, height: int) -> None:
    canvas = best_canvas((width, height), LAVIDA.grid_pinpoints)
    index = packing((width, height), canvas, LAVIDA).rows[:, 0]
    views = 1 + canvas[0] * canvas[1] // 384**2
    assert index[:196].tolist() == list(range(196))
    assert index.max() <= views * 196
    # A picture thinner than a token keeps no row of tiles, as in the release; the thumbnail still shows it.
    rows = int((index == views * 196).sum())
    assert (len(index) - 196) % rows == 0 if rows else len(index) == 196
    tokens = index[index != views * 196]
    assert len(np.unique(tokens)) == len(tokens)


def test_views_are_the_thumbnail_then_the_tiles() -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8, 8:] = 255  # the top right quarter is white
    views = prepare_picture(Image.fromarray(pixels), TINY)
    assert views.pixel_values.shape == (5, 3, 8, 8)
    assert views.pixel_values.dtype == np.float32
    means = views.pixel_values.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means[1:], [-1, 1, -1, -1], atol=1e-6)
    assert views.pixel_values[0, :, :3, 5:].min() > 0.9


def test_small_aspect_pictures_are_centred_on_black() -> None:
    views = prepare_picture(Image.new("RGB", (32, 16), (255, 255, 255)), TINY)
    assert views.pixel_values.shape[0] == 3  # 16x8 fits it best
    tall = prepare_picture(Image.new("L", (10, 16), 255), TINY)
    assert tall.pixel_values.min() == -1.0


def test_pack_features_appends_the_newline_row() -> None:
    features, newline = np.arange(8.0).reshape(2, 2, 2), np.array([-1.0, -2.0])
    packed = pack_features(features, newline, Packing(np.array([[3], [4], [0]]), None))
    assert packed.tolist() == [[6, 7], [-1, -2], [0, 1]]


def test_a_text_file_named_png_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    with pytest.raises(D3tomError, match="not a picture that can be decoded"):
        open_picture(path)
    with pytest.raises(D3tomError, match="does not exist"):
        open_picture(tmp_path / "absent.png")


def test_deep_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 1000], [32768, 65535]], dtype=np.uint16)).save(path)
    assert np.asarray(open_picture(path))[..., 0].tolist() == [[0, 3], [127, 255]]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    Image.new("RGB", (9, 7), (200, 200, 200)).convert(mode).save(path)
    assert (open_picture(path).mode, open_picture(path).size) == ("RGB", (9, 7))


def test_a_truncated_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(D3tomError, match="damaged"):
        open_picture(path)
