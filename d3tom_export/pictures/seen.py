"""Visual tokens of pictures that were seen before, so that a further question about one does not encode it again.

V visual tokens, T tokens of a view, D width.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from d3tom_export.pictures.views import Views, pack_features

Floats = NDArray[np.float32]

MOST_BYTES = 256 << 20
"""What is kept by default: the visual tokens of sixteen pictures at LaViDa-8B's sizes, of four at LLaDA-V-8B's."""


class Eyes(Protocol):
    """What of a backend (:class:`~d3tom_export.loop.backend.Backend`) looks at pictures."""

    def encode_views(self, pixel_values: Floats) -> Floats:
        """(views, 3, S, S) float32 -> (views, T, D) float32."""

    @property
    def image_newline(self) -> Floats:
        """(D,) the vector that closes every row of a picture's tokens."""


def look(eyes: Eyes, views: Views) -> Floats:
    """The visual tokens (V, D) float32 of a picture's ``views``."""
    return pack_features(eyes.encode_views(views.pixel_values), eyes.image_newline, views.packing)


class SeenPictures:
    """Visual tokens by what they were made of: the views' pixels, their packing, and the backend that looked.

    Pictures of the same content are one, whatever their files are called. Of more than ``most_bytes`` those go that
    nobody asked for the longest. A backend's visual tokens serve it alone, even where another has the same weights; it
    is not kept alive by them. One thread at a time.

    Args:
        most_bytes: Bytes of visual tokens to keep; a picture with more is encoded every time.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[tuple[weakref.ref[Eyes], bytes], Floats] = OrderedDict()
        self._bytes = 0

    def look(self, eyes: Eyes, views: Views) -> Floats:
        """As :func:`look`, but what is remembered is not encoded; the array is read-only."""
        # References to a backend that is gone equal no other's, so an address that is used again is no mistake.
        key = (weakref.ref(eyes), _digest(views))
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        tokens = look(eyes, views)
        tokens.flags.writeable = False
        if tokens.nbytes <= self._most_bytes:
            self._kept[key] = tokens
            self._bytes += tokens.nbytes
        while self._bytes > self._most_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return tokens


def _digest(views: Views) -> bytes:
    """Sha256 of all that the visual tokens come from, shapes and dtypes included."""
    digest = hashlib.sha256()
    for array in (views.pixel_values, views.packing.rows, views.packing.weights):
        if array is None:
            digest.update(b"none;")
            continue
        digest.update(f"{array.dtype.str} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
