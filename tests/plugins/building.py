"""The C++ library, its harness and the stub of CUDA's driver, built by g++ with all warnings as errors."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from d3tom_export.plugins import embed
from tests.plugins.harness import Libraries

SOURCES = Path(__file__).parents[2] / "plugins" / "cpp"
OWN = Path(__file__).parent / "cpp"
SMS = (89, 120)
"""Architectures that the library of these tests has kernels for."""


class MissingError(Exception):
    """What the machine lacks to build them."""


def cuda_headers() -> Path:
    """Folder of cuda.h: the one named, the toolkit's, or Triton's own."""
    candidates = [os.environ.get("CUDA_INCLUDE_DIR"), "/usr/local/cuda/include"]
    candidates += [str(Path(entry) / "triton" / "backends" / "nvidia" / "include") for entry in sys.path]
    found = next((Path(path) for path in candidates if path and (Path(path) / "cuda.h").is_file()), None)
    if found is None:
        raise MissingError("there is no cuda.h in CUDA_INCLUDE_DIR, /usr/local/cuda or Triton's package")
    if shutil.which("g++") is None:
        raise MissingError("there is no g++ here")
    return found


def headers() -> list[str]:
    """Compiler options for the headers of TensorRT and CUDA."""
    if importlib.util.find_spec("triton") is None:
        raise MissingError("the kernels are compiled by Triton, which is not installed here")
    cuda = cuda_headers()
    folder = os.environ.get("TENSORRT_INCLUDE_DIR") or _packaged_headers()
    if not folder:
        raise MissingError(
            "TENSORRT_INCLUDE_DIR does not name the folder of TensorRT's headers, which are not ours to ship"
        )
    return ["-isystem", folder, "-isystem", str(cuda)]


def _packaged_headers() -> str | None:
    """TensorRT's headers as kernel-lens carries them; nothing of that package is imported."""
    found = importlib.util.find_spec("kernel_lens")
    for place in (found.submodule_search_locations or ()) if found else ():
        folder = Path(place) / "include" / "tensorrt"
        if (folder / "NvInfer.h").is_file():
            return str(folder)
    return None


def build(folder: Path) -> Libraries:
    """All of them into ``folder``, the embedded kernels too: ``folder``/kernels/merge_kernels.bin.

    :raises MissingError: the machine has no compiler or no headers.
    """
    options = headers()
    embed.write_kernels(folder / "kernels", SMS)
    common = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *options]
    made = Libraries(
        *(folder / f"lib{name}.so" for name in ("d3tom_merge_plugin", "d3tom_merge_plugin_autoload")),
        *(folder / f"lib{name}.so" for name in ("cuda_stub", "harness")),
    )
    sources = [*map(str, sorted(SOURCES.glob("*.cpp"))), str(folder / "kernels" / "merge_kernels.S")]
    commands = [
        [*common, "-fvisibility=hidden", *sources, "-o", str(made.plugin), "-ldl"],
        [*common, "-fvisibility=hidden", "-DD3TOM_SELF_REGISTER", *sources, "-o", str(made.autoload), "-ldl"],
        [*common, "-Wl,-soname,libcuda.so.1", str(OWN / "cuda_stub.cpp"), "-o", str(made.stub), "-ldl"],
        [*common, str(OWN / "harness.cpp"), "-o", str(made.harness), "-ldl"],
    ]
    for process in [subprocess.Popen(command) for command in commands]:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return made
