"""Real handwritten digits (scikit-learn's ``load_digits``), split by seed, and how one is inked onto a picture.

Shapes: H, W picture height and width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SPLIT_SEED = 20251118
HELD_OUT = 300
_MARGIN = 2
"""Empty source pixels put around an 8x8 digit, so that rotating it never cuts it off."""


@dataclass(frozen=True)
class DigitBank:
    """Some of the 1,797 digits: images (N, 12, 12) uint8 with ``_MARGIN`` empty pixels around, labels (N,) int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @classmethod
    def load(cls, held_out: bool) -> DigitBank:
        """The held-out digits, or all others. Held-out scenes use nothing that training ever saw."""
        from sklearn.datasets import load_digits

        data = load_digits()
        order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
        chosen = order[:HELD_OUT] if held_out else order[HELD_OUT:]
        images = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
        padding = ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN))
        return cls(np.pad(images, padding), data.target[chosen].astype(np.int64))


@dataclass(frozen=True)
class Box:
    """A digit's place: centre and size in pixels of the picture."""

    x: float
    y: float
    width: float
    height: float


def ink_digit(
    canvas: NDArray[np.float32],
    source: NDArray[np.uint8],
    box: Box,
    ink: NDArray[np.float32],
    degrees: float = 0.0,
    strength: float = 1.0,
) -> None:
    """Blend one digit into ``canvas`` (H, W, 3) float32, in place.

    The 8x8 source fills ``box`` and is upscaled by cubic interpolation, rotated by ``degrees``. Where it is darkest it
    takes the colour ``ink`` (3,), ``strength`` scaling its opacity before that is cut off at 1.
    """
    height, width, _ = canvas.shape
    reach_x, reach_y = box.width * 0.75, box.height * 0.75
    left, right = max(0, int(box.x - reach_x)), min(width, int(box.x + reach_x) + 1)
    top, bottom = max(0, int(box.y - reach_y)), min(height, int(box.y + reach_y) + 1)
    if left >= right or top >= bottom:
        return
    # PIL wants the map from target to source pixels: the inverse of scale-then-rotate about the centre.
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    step_x, step_y = 8 / box.width, 8 / box.height
    centre = source.shape[0] / 2
    off_x, off_y = left - box.x, top - box.y
    affine = (
        cos * step_x, sin * step_x, centre + (cos * off_x + sin * off_y) * step_x,
        -sin * step_y, cos * step_y, centre + (-sin * off_x + cos * off_y) * step_y,
    )  # fmt: skip
    stamp = Image.fromarray(source).transform(
        (right - left, bottom - top), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
    )
    opacity = np.minimum(np.asarray(stamp, np.float32) * (strength / 255), 1.0)[..., None]
    region = canvas[top:bottom, left:right]
    region += (ink - region) * opacity
