"""The interpreter's worker process, the stub of CUDA's driver and the C++ library, one each for all plugin tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from d3tom_export.plugins import embed
from tests.plugins.interpreter import Interpret, interpreter
from tests.plugins.walker import Libraries

SOURCES = Path(__file__).parents[2] / "plugins" / "cpp"
OWN = Path(__file__).parent / "cpp"
SMS = (89, 120)
"""Architectures that the library of these tests has kernels for."""


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
    source = OWN / "cuda_stub.cpp"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-isystem", cuda_headers]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", source, "-o", made, "-ldl"], check=True)
    return made


@pytest.fixture(scope="session")
def headers(cuda_headers: Path) -> list[str]:
    """Compiler options for the headers of TensorRT and CUDA."""
    pytest.importorskip("triton", reason="the kernels are compiled by Triton, which is not installed here")
    folder = os.environ.get("TENSORRT_INCLUDE_DIR") or _packaged_headers()
    if not folder:
        pytest.skip("TENSORRT_INCLUDE_DIR does not name the folder of TensorRT's headers, which are not ours to ship")
    return ["-isystem", folder, "-isystem", str(cuda_headers)]


def _packaged_headers() -> str | None:
    """TensorRT's headers as kernel-lens carries them; nothing of that package is imported."""
    found = importlib.util.find_spec("kernel_lens")
    for place in (found.submodule_search_locations or ()) if found else ():
        folder = Path(place) / "include" / "tensorrt"
        if (folder / "NvInfer.h").is_file():
            return str(folder)
    return None


@pytest.fixture(scope="session")
def kernels(headers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the embedded kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    embed.write_kernels(folder, SMS)
    return folder


@pytest.fixture(scope="session")
def library_kernels(kernels: Path) -> bytes:
    """The archive that the library carries."""
    return (kernels / "merge_kernels.bin").read_bytes()


@pytest.fixture(scope="session")
def libraries(
    headers: list[str], kernels: Path, cuda_stub: Path, tmp_path_factory: pytest.TempPathFactory
) -> Libraries:
    """The plugin library and its harness, built by g++ with all warnings as errors."""
    folder = tmp_path_factory.mktemp("libraries")
    common = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *headers]
    plugin, autoload = folder / "libd3tom_merge_plugin.so", folder / "libd3tom_merge_plugin_autoload.so"
    made = Libraries(plugin, autoload, cuda_stub, folder / "libharness.so")
    sources = [*map(str, sorted(SOURCES.glob("*.cpp"))), str(kernels / "merge_kernels.S")]
    commands = [
        [*common, "-fvisibility=hidden", *sources, "-o", str(made.plugin), "-ldl"],
        [*common, "-fvisibility=hidden", "-DD3TOM_SELF_REGISTER", *sources, "-o", str(made.autoload), "-ldl"],
        [*common, str(OWN / "harness.cpp"), "-o", str(made.harness), "-ldl"],
    ]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    return made
