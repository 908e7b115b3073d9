"""The merge's library for ONNX Runtime, compiled as its users compile it."""

from __future__ import annotations

from pathlib import Path

import pytest

from d3tom_export.plugins.cpu_library import compile_library
from tests.conftest import Shared


@pytest.fixture(scope="session")
def merge_library(shared: Shared) -> Path:
    name = "libd3tom_merge_cpu.so"
    return shared("merge-library", lambda folder: compile_library(folder / name)) / name
