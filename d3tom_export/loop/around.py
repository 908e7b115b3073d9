"""A backend around another one, for those that look at its sessions or change them. Imports no framework."""

from __future__ import annotations

from d3tom_export.loop.backend import Backend
from d3tom_export.loop.denoise import Floats, Ints


class Around:
    """All of ``backend`` but :meth:`Backend.start`, which a subclass has; shapes and dtypes as there."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.precision = backend.name, backend.precision
        self.kv_cache, self.shares_prefix = backend.kv_cache, backend.shares_prefix

    def embed_tokens(self, token_ids: Ints) -> Floats:
        return self._backend.embed_tokens(token_ids)

    def encode_views(self, pixel_values: Floats) -> Floats:
        return self._backend.encode_views(pixel_values)

    @property
    def image_newline(self) -> Floats:
        return self._backend.image_newline
