"""Pictures as callers have them: paths, files' contents, Pillow's images, NumPy's arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d3tom_export.errors import D3tomError
from d3tom_export.pictures.views import Views, open_picture
from d3tom_export.pipeline import Reader
from d3tom_export.progress import Note
from d3tom_export.trust.fields import shown
from d3tom_export.trust.images import as_rgb, decode_picture

OnePicture: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""A file's path or its content, an image of Pillow's, or an array of uint8: (H, W) grey, (H, W, 3) RGB or (H, W, 4)
RGBA, whose alpha is left out."""

_SHAPES = "(height, width), (height, width, 3) or (height, width, 4)"


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of a prompt, cut for one model's tower: for several questions about them. ``Model.see`` makes them."""

    views: tuple[Views, ...]
    """Of each, ``pixel_values`` (views, 3, S, S) float32."""

    @property
    def visual_tokens(self) -> int:
        """V: the tokens that all of them take in a prompt."""
        return sum(each.packing.visual_tokens for each in self.views)


Picture: TypeAlias = OnePicture | Pictures | list[OnePicture] | tuple[OnePicture, ...] | None
"""What is asked about: one picture, several in the order of the prompt's ``<image>``, or none."""


def listed(image: Picture) -> Sequence[OnePicture]:
    """The single pictures of ``image``, which is not :class:`Pictures`, in a sequence."""
    if image is None:
        return ()
    if isinstance(image, (str, os.PathLike, bytes, Image.Image, np.ndarray)):
        return (image,)
    if isinstance(image, (list, tuple)):
        return image
    raise D3tomError(_no_picture(image))


def count_pictures(image: Picture) -> int:
    """How many pictures ``image`` shows."""
    return len(image.views) if isinstance(image, Pictures) else len(listed(image))


def see(reader: Reader, image: Picture, note: Note, between: Callable[[], None] = lambda: None) -> Pictures:
    """``image`` cut for the tower of ``reader``'s model; one picture is decoded at a time, ``between`` called before.

    Raises :class:`D3tomError` where the model has no eyes, and for what is no picture within the limits of
    :mod:`d3tom_export.trust.images`.
    """
    if isinstance(image, Pictures):
        return image
    pictures = listed(image)

    def opened() -> Iterator[Image.Image]:
        for number, each in enumerate(pictures, 1):
            between()
            yield _opened(each, number, reader, note)

    return Pictures(tuple(reader.cut(opened(), len(pictures))))


def _opened(picture: Any, number: int, reader: Reader, note: Note) -> Image.Image:
    ignores, name = reader.ignore_orientation, f"picture {number} of the prompt"
    if isinstance(picture, (str, os.PathLike)):
        return open_picture(Path(picture), ignore_orientation=ignores, note=note)
    if isinstance(picture, bytes):
        return decode_picture(io.BytesIO(picture), name, ignore_orientation=ignores, note=note)
    if isinstance(picture, np.ndarray):
        picture = _of_array(picture, name)
    if isinstance(picture, Image.Image):
        return as_rgb(picture, name, ignore_orientation=ignores, note=note)
    raise D3tomError(_no_picture(picture))


def _of_array(array: NDArray[Any], name: str) -> Image.Image:
    colours = array.ndim == 3 and array.shape[-1] in (3, 4)
    if array.dtype != np.uint8 or not (array.ndim == 2 or colours) or not array.size:
        raise D3tomError(
            f"An array of {array.dtype} and shape {array.shape} was given for {name}, expected uint8 in {_SHAPES}. "
            "Several pictures are a list of arrays; values in [0, 1] are scaled by 255 first."
        )
    return Image.fromarray(array)


def _no_picture(value: Any) -> str:
    return (
        f"{shown(value)} was given for a picture. Give a path, the bytes of a picture's file, an image of Pillow's, an "
        f"array of uint8 in {_SHAPES}, a list of these, or None."
    )
