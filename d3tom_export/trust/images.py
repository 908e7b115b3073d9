"""Pictures of strangers: few decoders, limits from the header before a pixel is made, every failure one paragraph.

The decoders are those of everyday pictures: PNG, JPEG (and MPO, the phones' JPEG of several pictures), WebP, BMP, GIF,
TIFF and PPM. Each has been fuzzed for decades or is plain to read, and none starts a program, as Pillow's PostScript
does; formats of games, scanners and science stay out, their decoders are written in Python and little tried.

What is decoded is what ``Image.open(path).convert("RGB")`` gives, as the release has it, with three exceptions: EXIF
orientation is applied (``ignore_orientation`` leaves it), grey deeper than 8 bits is scaled where Pillow would clip it
to white, and a JPEG beyond :data:`EXACT_PIXELS`, which Pillow refuses and so the release, is decoded at 1/2, 1/4 or
1/8 of its size. No frame of an animated picture but the first is looked at.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from d3tom_export.errors import D3tomError, printable
from d3tom_export.progress import Note, no_note

EXACT_PIXELS = 178_956_970
"""The largest picture that Pillow opens as it comes (twice ``Image.MAX_IMAGE_PIXELS``): decoded whole, in 8 bytes a
pixel at most, 4 for the decoder's picture and 4 for the RGB copy of it."""

LONGEST_SIDE = 1 << 18
"""Pixels. Scaling needs memory by the longer side, not only by the area: 0.4 GB for a thumbnail of one so tall."""

_FORMATS = ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Beside JPEG, which is opened by its own name: Pillow would refuse the large ones before they can be scaled."""

_MOST_BYTES = 1 << 30
"""Of a file; 179 megapixels of 16-bit colour, uncompressed."""

_MOST_BYTES_IN_PYTHON = 4 << 20
"""Of a file whose decoder is written in Python (plain PPM, run-length BMP): some seconds of work."""

_MOST_PIXELS = {"WEBP": 80_000_000, "JPEG": 1 << 30, "progressive JPEG": 208_000_000}
"""Where it is not :data:`EXACT_PIXELS`. WebP's decoder holds 16 bytes a pixel, a progressive JPEG's 6 for its
coefficients beside 4 of the picture; another JPEG is decoded line by line, and small."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation."""

_STRIP_PIXELS = 1 << 22
"""Deep greys are scaled so many pixels at a time."""

# Pillow logs what it then raises; without a handler of the application's, logging would print it.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class _NoWarnings:
    """A context in which no warning is shown. Filters are the whole process's, and several threads may be within at
    once: the first one in sets them, the last one out puts back what there was."""

    def __init__(self) -> None:
        self._lock, self._within = threading.Lock(), 0
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._caught.__exit__(None, None, None)


_no_warnings = _NoWarnings()


@contextmanager
def _guarded(name: str) -> Iterator[None]:
    """Whatever Pillow raises becomes a :class:`D3tomError` about the picture ``name``; its warnings are not shown."""
    try:
        with _no_warnings:
            yield
    except D3tomError:
        raise
    except UnidentifiedImageError:
        raise D3tomError(
            f"{name} is not a picture that can be decoded, whatever its name ends in. "
            "Give a PNG, JPEG, WebP, BMP, GIF, TIFF or PPM file."
        ) from None
    except Image.DecompressionBombError:
        raise D3tomError(
            f"{name} is too large: it has more than {EXACT_PIXELS / 1e6:.0f} megapixels. Scale it down; no model sees "
            "more than a few megapixels of it."
        ) from None
    except MemoryError:
        raise D3tomError(f"Decoding {name} takes more memory than there is. Scale the picture down.") from None
    except Exception as error:  # Pillow raises what its decoders happen to: struct.error, IndexError, …
        reason = printable(str(error), 200) or type(error).__name__
        raise D3tomError(f"Picture {name} is damaged or unreadable: {reason}. Save it again or give another.") from None


@contextmanager
def opened_picture(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    """A picture's header, checked against all limits; no pixel is decoded yet. ``name`` is what messages call it.

    Raises :class:`D3tomError` also for whatever goes wrong with the picture while it is open.
    """
    with _guarded(name):
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size > _MOST_BYTES:
            raise D3tomError(f"{name} has {size:,} bytes, at most {_MOST_BYTES:,} are read. Scale the picture down.")
        magic = file.read(3)
        file.seek(0)
        opened = JpegImagePlugin.jpeg_factory(file) if magic == b"\xff\xd8\xff" else Image.open(file, formats=_FORMATS)
        with opened as picture:
            _check_header(picture, size, name)
            yield picture


def _check_header(picture: Image.Image, file_bytes: int, name: str) -> None:
    width, height = picture.size
    kind = "JPEG" if picture.format == "MPO" else picture.format or ""
    if kind == "JPEG" and picture.info.get("progressive"):
        kind = "progressive JPEG"
    most = _MOST_PIXELS.get(kind, EXACT_PIXELS)
    if not (width and height):
        raise D3tomError(f"{name} is {width} x {height} pixels large: there is nothing to see. Give another picture.")
    if max(width, height) > LONGEST_SIDE or width * height > most:
        raise D3tomError(
            f"{name} is too large: it is {width:,} x {height:,} pixels; a {kind} picture may have {most / 1e6:.0f} "
            f"megapixels and sides of {LONGEST_SIDE:,} pixels. Scale it down; no model sees more than a few megapixels "
            "of it."
        )
    in_python = any(tile[0] in Image.DECODERS for tile in getattr(picture, "tile", ()))
    if in_python and file_bytes > _MOST_BYTES_IN_PYTHON:
        raise D3tomError(
            f"{name} has {file_bytes:,} bytes in a variant of {kind} that is slow to read; at most "
            f"{_MOST_BYTES_IN_PYTHON:,} are. Save it as PNG."
        )


def decode_picture(file: BinaryIO, name: str, *, ignore_orientation: bool = False, note: Note = no_note) -> Image.Image:
    """The picture in an open file as RGB, 8 bits a channel; ``name`` is what messages call it.

    ``note`` hears where it is not the whole picture as stored. Raises :class:`D3tomError` where it is no picture, or
    one beyond the limits.
    """
    with _guarded(name):
        picture, turn = _decode(file, name, note)
        return picture if turn is None or ignore_orientation else picture.transpose(turn)


def _decode(file: BinaryIO, name: str, note: Note) -> tuple[Image.Image, Image.Transpose | None]:
    """The picture as stored, and what makes it upright. The decoder's own copy is given back on return."""
    with opened_picture(file, name) as picture:
        if getattr(picture, "is_animated", False):
            note(f"{name} holds several pictures (frames or pages); the first is shown to the model.")
        _scale_while_decoding(picture, name, note)
        picture.load()
        return _to_rgb(picture, name, note), _TURNS.get(_orientation(picture))


def as_rgb(picture: Image.Image, name: str, *, ignore_orientation: bool = False, note: Note = no_note) -> Image.Image:
    """A picture that a program of ours holds already, as :func:`decode_picture` gives one of a file.

    Of one that is open on a file, the pixels are read. Raises :class:`D3tomError` likewise.
    """
    with _guarded(name):
        _check_header(picture, 0, name)
        found, turn = _to_rgb(picture, name, note), _TURNS.get(_orientation(picture))
        return found if turn is None or ignore_orientation else found.transpose(turn)


def _scale_while_decoding(picture: Image.Image, name: str, note: Note) -> None:
    (width, height), pixels = picture.size, picture.width * picture.height
    if pixels <= EXACT_PIXELS:
        return
    factor = next(factor for factor in (2, 4, 8) if pixels <= EXACT_PIXELS * factor**2)
    picture.draft(None, (width // factor, height // factor))
    note(
        f"{name} is {width:,} x {height:,} pixels, more than {EXACT_PIXELS / 1e6:.0f} megapixels: it is decoded at "
        f"1/{factor} of its size, {picture.width:,} x {picture.height:,}."
    )


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1 where there is none or where the EXIF data are damaged. TIFF is upright once it is loaded."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(picture: Image.Image, name: str, note: Note) -> Image.Image:
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        low, high = _extremes(picture)
        if low < 0 or high > 65535:
            raise ValueError("its grey values exceed 16 bits")
        return _map_grey(picture, lambda values: values // 257)
    if picture.mode == "F":
        low, high = _extremes(picture)
        if not (low >= 0 and high <= 255):  # also where one is NaN
            raise D3tomError(
                f"{name} holds floating-point grey from {low:g} to {high:g}, expected 0 to 1 or 0 to 255. Scale its "
                "values, or save it with 8 bits a channel."
            )
        if high <= 1:
            note(f"{name} holds floating-point grey up to {high:g}: 1 is taken for white.")
            return _map_grey(picture, lambda values: np.rint(values * 255))
    return picture.convert("RGB")


def _strips(picture: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    rows = max(_STRIP_PIXELS // picture.width, 1)
    for top in range(0, picture.height, rows):
        yield top, np.asarray(picture.crop((0, top, picture.width, min(top + rows, picture.height))))


def _extremes(picture: Image.Image) -> tuple[float, float]:
    ends = [(values.min(), values.max()) for _, values in _strips(picture)]
    # NumPy's: Python's min() and max() would lose a NaN.
    return float(np.min([low for low, _ in ends])), float(np.max([high for _, high in ends]))


def _map_grey(picture: Image.Image, to_8_bits: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    grey = Image.new("L", picture.size)
    for top, values in _strips(picture):
        grey.paste(Image.fromarray(to_8_bits(values).astype(np.uint8)), (0, top))
    return grey.convert("RGB")
