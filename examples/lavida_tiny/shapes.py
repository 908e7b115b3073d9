"""Plain shapes beside the digits, and the colours that both are inked in."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .digits import Box

SHAPES = ("circle", "ring", "square", "triangle", "star", "cross")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 30, 35),
    "green": (25, 135, 45),
    "blue": (30, 60, 200),
    "orange": (235, 130, 15),
    "purple": (130, 35, 150),
    "black": (25, 25, 30),
}

_OVERSAMPLE = 4
"""Shapes are drawn this much larger and averaged down, which makes their edges smooth."""


def _star(centre: float, reach: float) -> list[tuple[float, float]]:
    return [
        (centre + (reach if point % 2 == 0 else 0.42 * reach) * math.sin(point * math.pi / 5),
         centre - (reach if point % 2 == 0 else 0.42 * reach) * math.cos(point * math.pi / 5))
        for point in range(10)
    ]  # fmt: skip


def _draw(shape: str, side: int) -> Image.Image:
    """``shape`` filling a square of ``side`` pixels, white on black."""
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    edge, thick = side - 1, round(side * 0.2)
    if shape == "circle":
        draw.ellipse((0, 0, edge, edge), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, edge, edge), outline=255, width=thick)
    elif shape == "square":
        margin = round(side * 0.08)
        draw.rectangle((margin, margin, edge - margin, edge - margin), fill=255)
    elif shape == "triangle":
        draw.polygon([(edge / 2, 0), (0, edge), (edge, edge)], fill=255)
    elif shape == "star":
        draw.polygon(_star(edge / 2, edge / 2), fill=255)
    else:
        near, far = (side - thick) // 2, (side + thick) // 2
        draw.rectangle((near, 0, far, edge), fill=255)
        draw.rectangle((0, near, edge, far), fill=255)
    return image


def ink_shape(
    canvas: NDArray[np.float32], shape: str, box: Box, ink: NDArray[np.float32], degrees: float = 0.0
) -> None:
    """Draw one of :data:`SHAPES` into ``canvas`` (H, W, 3) float32, in place, filling ``box`` in the colour ``ink``."""
    side = round(max(box.width, box.height))
    stamp = _draw(shape, side * _OVERSAMPLE).rotate(degrees, Image.Resampling.BILINEAR)
    width, height = round(box.width), round(box.height)
    opacity = np.asarray(stamp.resize((width, height), Image.Resampling.BOX), np.float32)[..., None] / 255
    left, top = round(box.x - width / 2), round(box.y - height / 2)
    region = canvas[max(0, top) : top + height, max(0, left) : left + width]
    opacity = opacity[max(0, -top) :, max(0, -left) :][: region.shape[0], : region.shape[1]]
    region += (ink - region) * opacity
