"""The module ``onnxruntime``, which several packages provide, one at a time; or what to install.

They all install into the same folder. Of two of them the one that was unpacked last is imported, with files of the
other between its own, and uninstalling one breaks the other: so none is a base dependency, and extras choose one.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from d3tom_export.errors import D3tomError, listing

INSTALL_CPU = 'pip install "d3tom-export[cpu]"'
INSTALL_CUDA = 'pip install "d3tom-export[cuda]"'

_PACKAGES = (
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-trt-rtx", "onnxruntime-directml", "onnxruntime-openvino"),
    *("onnxruntime-migraphx", "onnxruntime-rocm", "onnxruntime-qnn", "onnxruntime-webgpu", "onnxruntime-training"),
)
"""Packages that install a module of this name."""

try:
    import onnxruntime as ort
except ImportError as error:
    raise D3tomError(
        f"This needs ONNX Runtime, which cannot be imported here ({error}). Install it with `{INSTALL_CPU}`, or for an "
        f"NVIDIA GPU with `{INSTALL_CUDA}`; one of the two, they own the same module."
    ) from None

__all__ = ["INSTALL_CPU", "INSTALL_CUDA", "installed_packages", "ort", "ort_version", "overlapping_packages"]


def ort_version() -> tuple[int, ...]:
    """ONNX Runtime's version: major, minor."""
    return tuple(int(part) for part in ort.__version__.split(".")[:2])


def installed_packages() -> dict[str, str]:
    """The installed packages that own the module, with their versions."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Overlap(NamedTuple):
    """More than one package that owns the module, and what to do about it; neither ends in a full stop."""

    found: str
    remedy: str


def overlapping_packages() -> Overlap | None:
    """The packages that own the module, where they are several."""
    found = installed_packages()
    if len(found) < 2:
        return None
    return Overlap(
        f"{listing(f'{name} {number}' for name, number in found.items())} are installed over one another, and which of "
        "them runs is chance",
        f"pip uninstall {' '.join(found)}, then {INSTALL_CUDA} on an NVIDIA GPU, else {INSTALL_CPU}",
    )
