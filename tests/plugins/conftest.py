"""The interpreter's worker process and the stub of CUDA's driver, one each for all tests of the plugins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.interpreter import Interpret, interpreter


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    """Runs a function of :mod:`tests.plugins.interpreter` in the worker."""
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed here")
    with interpreter() as run:
        yield run


@pytest.fixture(scope="session")
def cuda_headers() -> Path:
    """Folder of cuda.h: the one named, the toolkit's, or Triton's own."""
    candidates = [os.environ.get("CUDA_INCLUDE_DIR"), "/usr/local/cuda/include"]
    candidates += [str(Path(entry) / "triton" / "backends" / "nvidia" / "include") for entry in sys.path]
    found = next((Path(path) for path in candidates if path and (Path(path) / "cuda.h").is_file()), None)
    if found is None:
        pytest.skip("there is no cuda.h in CUDA_INCLUDE_DIR, /usr/local/cuda or Triton's package")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    return found


@pytest.fixture(scope="session")
def cuda_stub(cuda_headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library whose soname is libcuda.so.1: a process that has loaded it finds it where it looks for the driver.

    One for the session: of two, the worker would reach whichever it loaded first.
    """
    made = tmp_path_factory.mktemp("stub") / "libcuda_stub.so"
    source = Path(__file__).parent / "cpp" / "cuda_stub.cpp"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-isystem", cuda_headers]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", source, "-o", made, "-ldl"], check=True)
    return made
