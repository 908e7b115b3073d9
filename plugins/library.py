"""The merge plugin for running engines: the C++ library where one is named, the Python plugin otherwise.

A library is code that a process takes in, so none is looked for: the environment variable names it. Engines are built
with the Python plugin, whose kernels are compiled for the GPU in question; a plan built with one form runs with the
other.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from d3tom_export.errors import D3tomError
from d3tom_export.plugins.merge_op import ROWS
from d3tom_export.plugins.merge_plugin import (
    PLUGIN_NAME,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    register_merge_plugin,
    take_place,
)

LIBRARY_VARIABLE = "D3TOM_EXPORT_MERGE_LIBRARY"
"""Names the library that ``plugins/cpp`` is built to; not set or empty: the Python plugin runs the merges."""

_opened: list[ctypes.CDLL] = []
"""TensorRT closes a library that is taken out of its registry; engines may still hold its plugins."""


def register_merge_runtime(trt: Any) -> Path | None:
    """Make the plugin known to ``trt`` for deserializing engines; returns the library's path, None for Python's.

    :raises D3tomError: the named library cannot be loaded or does not fit, or TensorRT refuses the plugin.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if not named:
        register_merge_plugin(trt)
        return None
    library = Path(named).absolute()
    take_place(trt, str(library), partial(_load, trt, library))
    return library


def _load(trt: Any, library: Path) -> Callable[[], None]:
    """Load ``library`` into ``trt``'s registry; returns what takes it out again."""
    if not library.is_file():
        raise _misfit(library, "is no file")
    try:
        opened = ctypes.CDLL(str(library))
    except OSError as error:
        raise _misfit(library, f"cannot be opened ({error})") from None
    if not hasattr(opened, "getCreators"):
        raise _misfit(library, "offers no plugins by `getCreators` (the _autoload form is for other programs)")
    registry = trt.get_plugin_registry()
    handle = registry.load_library(str(library))
    if handle is None:
        raise _misfit(library, f"is refused by {trt.__name__} {trt.__version__}")
    creator = registry.get_creator(PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    fields = [] if creator is None else [field.name for field in creator.field_names]
    if ROWS not in fields:
        registry.deregister_library(handle)
        what = (
            f"offers no plugin {PLUGIN_NAMESPACE}::{PLUGIN_NAME}" if creator is None else "is of an older d3tom-export"
        )
        raise _misfit(library, what)
    _opened.append(opened)
    return lambda: registry.deregister_library(handle)


def _misfit(library: Path, what: str) -> D3tomError:
    return D3tomError(
        f"The merge plugin's library {library}, which {LIBRARY_VARIABLE} names, {what}. Build it from this version's "
        f"plugins/cpp (docs/merge_plugin.md), or unset {LIBRARY_VARIABLE}: the Python plugin then runs the merges."
    )
