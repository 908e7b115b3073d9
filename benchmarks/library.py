"""The merge's library for ONNX Runtime's CPU, compiled once for a benchmark that runs both ways of merging."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from d3tom_export.plugins.cpu_library import compile_library


@cache
def merge_library() -> Path:
    """For this machine; it goes with the process."""
    library = Path(tempfile.mkdtemp(prefix="d3tom-merge-")) / "libd3tom_merge_cpu.so"
    atexit.register(shutil.rmtree, library.parent, ignore_errors=True)
    compile_library(library)
    return library
