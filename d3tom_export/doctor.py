"""Which backends can run here, and what the others need. Imports each runtime only to ask it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Finding:
    """One row of the report."""

    name: str
    usable: bool
    found: str
    remedy: str = ""


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _onnxruntime_cpu() -> Finding:
    import onnxruntime

    return Finding("onnxruntime (cpu)", True, f"onnxruntime {onnxruntime.__version__}")


def _onnxruntime_cuda() -> Finding:
    import onnxruntime

    usable = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    found = f"onnxruntime {onnxruntime.__version__} {'with' if usable else 'without'} a CUDA provider"
    return Finding(
        "onnxruntime (cuda)",
        usable,
        found,
        "" if usable else "on an NVIDIA GPU: pip uninstall onnxruntime, then pip install onnxruntime-gpu",
    )


def _pytorch() -> Finding:
    import torch

    device = f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "CPU"
    transformers = _installed("transformers")
    if transformers is None:
        return Finding("pytorch (oracle)", False, f"torch {torch.__version__}", "pip install transformers")
    return Finding("pytorch (oracle)", True, f"torch {torch.__version__} ({device}), transformers {transformers}")


def _export() -> Finding:
    missing = [name for name in ("torch", "transformers", "onnx", "onnxscript") if _installed(name) is None]
    found = ", ".join(f"{name} {_installed(name)}" for name in ("onnx", "onnxscript") if _installed(name)) or "nothing"
    return Finding("build (export)", not missing, found, f"pip install {' '.join(missing)}" if missing else "")


_CHECKS: tuple[tuple[str, Callable[[], Finding], str], ...] = (
    ("onnxruntime (cpu)", _onnxruntime_cpu, "pip install onnxruntime"),
    ("onnxruntime (cuda)", _onnxruntime_cuda, "pip install onnxruntime-gpu"),
    ("pytorch (oracle)", _pytorch, 'pip install "d3tom-export[build]"'),
    ("build (export)", _export, 'pip install "d3tom-export[build]"'),
)


def examine() -> list[Finding]:
    """Every backend's state. A runtime that cannot be imported is a finding, not an error."""
    findings = []
    for name, check, remedy in _CHECKS:
        try:
            findings.append(check())
        except Exception as error:  # a broken install raises whatever it likes
            findings.append(Finding(name, False, f"cannot be imported ({type(error).__name__}: {error})", remedy))
    return findings


def machine() -> dict[str, str]:
    """What else decides what runs here."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "nvidia driver": "present" if shutil.which("nvidia-smi") else "not found",
    }
