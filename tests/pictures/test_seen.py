"""What is remembered of pictures, and for whom."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from d3tom_export.pictures.seen import SeenPictures, look
from d3tom_export.pictures.views import Packing, Views


class Eyes:
    """Features that are the mean of each view, times ``sharpness``; counts its looks."""

    def __init__(self, sharpness: float = 1.0) -> None:
        self.sharpness, self.looks = sharpness, 0

    def encode_views(self, pixel_values: np.ndarray) -> np.ndarray:
        self.looks += 1
        return np.tile(pixel_values.mean(axis=(1, 2, 3))[:, None, None] * np.float32(self.sharpness), (1, 2, 4))

    @property
    def image_newline(self) -> np.ndarray:
        return np.full(4, 9, np.float32)


def _views(value: float, rows: tuple[int, ...] = (0, 1, 2), weights: np.ndarray | None = None) -> Views:
    """One view of a colour, of whose two tokens and the newline visual tokens are made: 4 floats each."""
    packing = Packing(np.array(rows)[:, None], weights)
    return Views(np.full((1, 3, 2, 2), value, np.float32), packing)


def test_a_picture_is_looked_at_once() -> None:
    eyes, seen = Eyes(), SeenPictures()
    first = seen.look(eyes, _views(0.5))
    assert np.array_equal(first, look(Eyes(), _views(0.5)))
    assert first.shape == (3, 4)
    assert seen.look(eyes, _views(0.5)) is first
    assert eyes.looks == 1
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0


@pytest.mark.parametrize(
    "other",
    [
        _views(0.25),
        _views(0.5, rows=(1, 0, 2)),
        _views(0.5, rows=(0, 1)),
        _views(0.5, weights=np.full((3, 1), 0.5, np.float32)),
        Views(np.full((3, 1, 2, 2), 0.5, np.float32), _views(0.5).packing),
    ],
    ids=["pixels", "order", "fewer", "weights", "shape"],
)
def test_what_differs_in_anything_is_another_picture(other: Views) -> None:
    eyes, seen = Eyes(), SeenPictures()
    seen.look(eyes, _views(0.5))
    assert np.array_equal(seen.look(eyes, other), look(Eyes(), other))
    assert eyes.looks == 2


def test_each_backend_has_its_own_and_is_not_kept_by_them() -> None:
    blurred, sharp, seen = Eyes(), Eyes(2.0), SeenPictures()
    assert not np.array_equal(seen.look(blurred, _views(0.5)), seen.look(sharp, _views(0.5)))
    gone = weakref.ref(blurred)
    del blurred
    gc.collect()
    assert gone() is None
    another = Eyes(3.0)  # perhaps where that one was
    assert np.array_equal(seen.look(another, _views(0.5)), look(another, _views(0.5)))
    assert np.array_equal(seen.look(sharp, _views(0.5)), look(sharp, _views(0.5)))


def test_those_go_first_that_nobody_asked_for_the_longest() -> None:
    size = 3 * 4 * 4
    eyes, seen = Eyes(), SeenPictures(most_bytes=2 * size)
    for value in (0.1, 0.2, 0.1, 0.3):  # 0.2 goes
        seen.look(eyes, _views(value))
    assert eyes.looks == 3
    seen.look(eyes, _views(0.1))
    seen.look(eyes, _views(0.3))
    assert eyes.looks == 3
    seen.look(eyes, _views(0.2))
    assert eyes.looks == 4


def test_a_picture_beyond_the_limit_is_encoded_every_time_and_drives_none_out() -> None:
    small, large = _views(0.1, rows=(0, 1)), _views(0.2)
    eyes, seen = Eyes(), SeenPictures(most_bytes=2 * 4 * 4)
    for views in (small, large, large, small):
        seen.look(eyes, views)
    assert eyes.looks == 3
