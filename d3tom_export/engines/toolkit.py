"""TensorRT or TensorRT-RTX: one API under two package names. This module finds the one that is asked for."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from d3tom_export.errors import D3tomError

ToolkitName = Literal["tensorrt", "tensorrt-rtx"]
TOOLKITS: tuple[ToolkitName, ...] = get_args(ToolkitName)

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_RTX_LIBRARY = "libtensorrt_rtx.so"

# TensorRT-RTX leaves Hopper and the data centre's Blackwell to TensorRT.
_RTX_ARCHITECTURES = (80, 86, 89, 120, 121)
_RTX_FIRST = 80  # for Turing (SM75) TensorRT-RTX 1.7 compiles no product of float32 matrices, as merge scores are


@dataclass(frozen=True)
class Toolkit:
    """An importable TensorRT: its module (``Any``: neither package ships types), the name users know, its version."""

    name: ToolkitName
    trt: Any
    version: str

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for GPUs that are not here. TensorRT times its kernels on the GPU that it builds for."""
        return self.name == "tensorrt-rtx"

    @property
    def architectures(self) -> tuple[int, ...] | None:
        """Compute capabilities that it builds stages for and runs them on; None where it does not say, as TensorRT."""
        if self.name != "tensorrt-rtx":
            return None
        known = getattr(self.trt, "ComputeCapability", None)
        named = [int(name[2:]) for name in known.__members__ if name.startswith("SM")] if known else []
        return tuple(sm for sm in named if sm >= _RTX_FIRST) or _RTX_ARCHITECTURES


def _let_parser_find_library(module: ModuleType) -> None:
    """Give TensorRT-RTX's library the name under which its own ONNX parser looks for it.

    When the parser makes a plugin layer it opens ``libtensorrt_rtx.so``, but the wheel ships only
    ``libtensorrt_rtx.so.1``, and the process is aborted (reference/tensorrt.md 1.4). A link beside it is found, since
    the parser's run path is its own folder.
    """
    for library in getattr(importlib.import_module("tensorrt_rtx_libs"), "__path__", []):
        folder = Path(library)
        versioned = sorted(folder.glob(f"{_RTX_LIBRARY}.*"))
        if not versioned or (folder / _RTX_LIBRARY).exists():
            continue
        try:
            os.symlink(versioned[0].name, folder / _RTX_LIBRARY)
        except FileExistsError:
            pass  # another process was quicker
        except OSError as error:
            raise D3tomError(
                f"TensorRT-RTX {module.__version__} cannot make plugin layers: its ONNX parser looks for "
                f"{_RTX_LIBRARY}, the package ships only {versioned[0].name}, and a link cannot be made ({error}). Run "
                f"`ln -s {versioned[0].name} {folder / _RTX_LIBRARY}` as the owner of that folder, or install "
                "tensorrt-rtx into a virtual environment of yours."
            ) from None


@cache
def load_toolkit(name: ToolkitName) -> Toolkit:
    """Import ``name`` and make it fit to parse graphs with plugins.

    Raises :class:`D3tomError` where the package is missing, is a placeholder without libraries, or cannot be loaded.
    """
    try:
        module = importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise D3tomError(
            f"Engines of {name} need the package {_MODULES[name]}, which cannot be imported here ({error}). "
            f'`pip install "d3tom-export[{name}]"` installs it; `d3tom-export doctor` shows what works.'
        ) from None
    if not hasattr(module, "Builder") or not hasattr(module, "OnnxParser"):
        raise D3tomError(
            f"The installed package {_MODULES[name]} is a placeholder without TensorRT's libraries. Install the real "
            f"one: `pip install --extra-index-url https://pypi.nvidia.com {name}`."
        )
    if name == "tensorrt-rtx" and os.name == "posix":
        _let_parser_find_library(module)
    return Toolkit(name, module, str(module.__version__))
