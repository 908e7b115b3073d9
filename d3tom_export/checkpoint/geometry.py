"""Named geometries: the sizes of known models, for export, FLOPs and benchmarks without a checkpoint.

A geometry is a ``config.json`` and nothing else. Imports no framework.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d3tom_export.bundled import DEFAULT_MODEL, bundled_model
from d3tom_export.config import CONFIG_FILE, ModelConfig
from d3tom_export.errors import D3tomError, listing
from d3tom_export.families.registry import RELEASED, geometries, read_config
from d3tom_export.trust.documents import read_json

GEOMETRIES = (*geometries(), DEFAULT_MODEL)
"""Those of the families, and the bundled model's."""

DEFAULT_GEOMETRY = next(iter(RELEASED.geometries))
"""What sizes are told for where nobody says of what: the model that D3ToM was released for."""


def raw_geometry(name: str) -> dict[str, Any]:
    """The ``config.json`` of a geometry.

    Raises :class:`D3tomError` for a name that is none of :data:`GEOMETRIES`.
    """
    if name == DEFAULT_MODEL:
        return read_json(bundled_model() / CONFIG_FILE)
    known = geometries()
    if name not in known:
        raise D3tomError(f"{name!r} is no geometry that this tool knows. Choose one of {listing(GEOMETRIES)}.")
    return dict(known[name])


def geometry_config(name: str) -> ModelConfig:
    """A geometry as configuration, every stored vocabulary row in use."""
    return read_config(raw_geometry(name), source=str(Path(name) / CONFIG_FILE))
