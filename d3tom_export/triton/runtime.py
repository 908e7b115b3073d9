"""What runs in the server: this package, as far as it runs bundles, and the packages that it needs there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import d3tom_export
from d3tom_export.errors import D3tomError

_DISTRIBUTION = "d3tom-export"
_LEFT_OUT = {"cli", "models"}
"""Folders of the package that run no bundle: the command line, and the bundled model's checkpoint."""
_NOT_SERVED = {"click", "triton"}
"""Requirements of the command line, and of compiling kernels."""

NUMPY = "numpy>=1.26,<2"
"""The Python backends that were tried are made for NumPy 1."""


def runtime_files() -> Iterator[tuple[str, Path]]:
    """The package's modules, by their place under a folder that is on the path."""
    root = Path(d3tom_export.__file__).parent
    roots = {_DISTRIBUTION.replace("-", "_"): root}
    plugins = root / "plugins"
    if not plugins.is_dir():  # an editable install keeps them elsewhere
        from d3tom_export import plugins as package

        roots["d3tom_export/plugins"] = Path(package.__path__[0])
    for place, folder in roots.items():
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder)
            if name.parts[0] not in _LEFT_OUT:
                yield f"{place}/{name.as_posix()}", path


def requirements(backend: str, device: str, built: str | None = None) -> list[str]:
    """What the server's Python needs for a backend, as pip takes it.

    ``built`` is the version of TensorRT that built the engines: none but that one runs them. Raises
    :class:`D3tomError` where this package is not installed, and so nobody knows.
    """
    extra = backend if backend in ("tensorrt", "tensorrt-rtx") else "cpu" if device == "cpu" else "cuda"
    try:
        told = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        raise D3tomError(
            f"{_DISTRIBUTION} runs here without being installed, so what it requires is not known. Install it with pip."
        ) from None
    found = []
    for line in told:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if name not in _NOT_SERVED and (not marker or marker == f'extra == "{extra}"'):
            pinned = f"{name}=={built}" if built is not None and name == backend else requirement
            found.append(NUMPY if name == "numpy" else pinned)
    if takes_plugin(device):
        found = [each for each in found if not each.startswith("onnxruntime")]
        found += ["onnxruntime>=1.24", "onnxruntime-ep-nv-tensorrt-rtx"]
    return sorted(found)


def takes_plugin(device: str) -> bool:
    """Whether ONNX Runtime loads this provider as a plugin: from 1.24 on, which has no wheel for Python 3.10."""
    return device == "nv-tensorrt-rtx"
