"""What can run here, and what the rest needs. Imports each runtime only to ask it."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from d3tom_export.errors import D3tomError

if TYPE_CHECKING:
    from d3tom_export.backends.onnxruntime_options import Provider
    from d3tom_export.engines.cuda import Gpu
    from d3tom_export.engines.toolkit import Toolkit, ToolkitName


OLDEST_TORCH = (2, 10)
"""pyproject.toml's bound: 2.6, 2.7 and 2.9 cannot export, and what 2.8 exports stops when it runs."""


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
    from d3tom_export.backends.onnxruntime_package import installed_packages, ort, ort_version, overlapping_packages
    from d3tom_export.backends.onnxruntime_stage import runs_int8
    from d3tom_export.plugins.cpu_library import give_kernel, named_library

    usable = ort_version() >= (1, 23)  # the first that runs the graphs for the CPU
    package = next(iter(installed_packages()), "onnxruntime")
    found = f"{package} {ort.__version__}{'' if runs_int8() else ', too old for int8'}"
    remedy = "" if usable and runs_int8() else f"pip install --upgrade {package}"
    overlap = overlapping_packages()
    if overlap is not None:
        found, remedy = overlap
    try:
        library = named_library()
        if library is not None:
            give_kernel(ort.SessionOptions(), library)
            found = f"{found}, merge library {library}"
    except D3tomError as error:
        usable, remedy = False, str(error)
    return Finding("onnxruntime (cpu)", usable, found, remedy)


def _onnxruntime_on_gpu(provider: Provider) -> Finding:
    """Whether a session gets ``provider`` here: a real one is made."""
    from d3tom_export.backends.onnxruntime_package import ort
    from d3tom_export.backends.onnxruntime_providers import problem_of, remedy_of

    problem = problem_of(provider)
    name = f"onnxruntime ({provider})"
    if problem:
        return Finding(name, False, problem, remedy_of(provider, problem))
    return Finding(name, True, f"onnxruntime {ort.__version__}, a session got the provider")


def _pytorch() -> Finding:
    import torch

    device = f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "CPU"
    transformers = _installed("transformers")
    if transformers is None:
        return Finding("pytorch (oracle)", False, f"torch {torch.__version__}", "pip install transformers")
    return Finding("pytorch (oracle)", True, f"torch {torch.__version__} ({device}), transformers {transformers}")


def _export() -> Finding:
    missing = [name for name in ("torch", "transformers", "onnx", "onnxscript", "jinja2") if _installed(name) is None]
    found = ", ".join(f"{name} {_installed(name)}" for name in ("onnx", "onnxscript") if _installed(name)) or "nothing"
    torch, oldest = _installed("torch"), ".".join(map(str, OLDEST_TORCH))
    if torch is not None and tuple(map(int, re.findall(r"\d+", torch)[:2])) < OLDEST_TORCH:
        found = f"{found}, torch {torch}, too old to export"
        missing = [*missing, f'"torch>={oldest}"']
    return Finding("build (export)", not missing, found, f"pip install {' '.join(missing)}" if missing else "")


def _driver() -> tuple[list[Gpu], str]:
    """The GPUs that CUDA shows, and where there are none, why."""
    from d3tom_export.engines.cuda import gpus

    try:
        return gpus(), ""
    except D3tomError as error:
        return [], str(error).split(". ", 1)[0]


def _engines(name: ToolkitName) -> Finding:
    """Whether engines of ``name`` run here: library, then driver and GPU, then its architecture, then the plugin."""
    from d3tom_export.engines.cuda import INSTALL, driver_too_old
    from d3tom_export.engines.toolkit import load_toolkit

    toolkit = load_toolkit(name)
    found, remedy = [f"{name} {toolkit.version}"], ""
    devices, problem = _driver()
    supported = toolkit.architectures
    running = [gpu for gpu in devices if supported is None or gpu.sm in supported]
    if problem and _installed("cuda-bindings") is None:
        found, remedy = [*found, "without cuda-bindings"], f"{INSTALL}, and an NVIDIA GPU with its driver"
    elif (too_old := driver_too_old()) is not None:
        found, remedy = [*found, too_old.found], too_old.remedy
    elif problem:
        found, remedy = [*found, problem], "an NVIDIA GPU with its driver (nvidia-smi shows whether it works)"
    elif not running:
        found.append(f"runs on {', '.join(f'SM{sm}' for sm in supported or ())}, not on {devices[0]}")
        remedy = "--backend tensorrt, with engines of that"
    else:
        found.append(", ".join(map(str, running)))
    plugin = _plugin(toolkit)
    found.append(plugin or "merge plugin loadable")
    if plugin and not remedy:
        remedy = "engines built with --merge-op onnx run without it"
    return Finding(name, bool(running), "; ".join(found), remedy)


def _plugin(toolkit: Toolkit) -> str:
    """What keeps the merge plugin from being loaded; empty if nothing does."""
    try:
        from d3tom_export.plugins.library import register_merge_runtime

        register_merge_runtime(toolkit.trt)
    except Exception as error:  # whatever a broken install raises
        return f"merge plugin cannot be loaded ({error})"
    return ""


def _ahead_of_time() -> Finding:
    """Whether engines can be built here for GPUs that are elsewhere; only TensorRT-RTX can."""
    from d3tom_export.engines.log import log_of
    from d3tom_export.engines.toolkit import load_toolkit

    toolkit = load_toolkit("tensorrt-rtx")
    builder = toolkit.trt.Builder(log_of(toolkit.trt).logger)
    missing = [name for name in ("torch", "onnx", "onnx-ir", "onnxscript") if _installed(name) is None]
    targets = ", ".join(f"SM{sm}" for sm in toolkit.architectures or ())
    found = [f"ahead of time with tensorrt-rtx {toolkit.version} for {targets}"]
    plugin = _plugin(toolkit)
    triton = _installed("triton")
    found.append(plugin or (f"merge plugin with triton {triton}" if triton else "no triton: --merge-op onnx only"))
    remedy = f"pip install {' '.join(missing)}" if missing else "" if triton else "pip install triton, for the plugin"
    return Finding("build (engines)", builder is not None and not missing, "; ".join(found), remedy)


def _extra(name: str, extra: str, packages: tuple[str, ...]) -> Finding:
    """Whether what an extra installs is there."""
    versions = {package: _installed(package) for package in packages}
    missing = [package for package, found in versions.items() if found is None]
    found = ", ".join(f"{package} {version}" for package, version in versions.items() if version) or "nothing"
    return Finding(name, not missing, found, f'pip install "d3tom-export[{extra}]"' if missing else "")


def _report() -> Finding:
    """What draws the pages of `report`; matplotlib alone draws every command's ``--figure``."""
    return _extra("report, figures", "report", ("jinja2", "matplotlib"))


def _serve() -> Finding:
    """What answers over HTTP."""
    return _extra("serve", "serve", ("starlette", "uvicorn", "prometheus-client"))


def _ray() -> Finding:
    """What spreads a batch over several machines."""
    return _extra("batch --ray", "ray", ("ray",))


_ON_A_GPU = 'on an NVIDIA GPU: pip install "d3tom-export[cuda]"'

_CHECKS: tuple[tuple[str, Callable[[], Finding], str], ...] = (
    ("onnxruntime (cpu)", _onnxruntime_cpu, 'pip install "d3tom-export[cpu]"'),
    ("onnxruntime (cuda)", lambda: _onnxruntime_on_gpu("cuda"), _ON_A_GPU),
    ("onnxruntime (tensorrt)", lambda: _onnxruntime_on_gpu("tensorrt"), _ON_A_GPU),
    (
        "onnxruntime (nv-tensorrt-rtx)",
        lambda: _onnxruntime_on_gpu("nv-tensorrt-rtx"),
        'on an RTX GPU: pip install "d3tom-export[cpu]" onnxruntime-ep-nv-tensorrt-rtx',
    ),
    ("pytorch (oracle)", _pytorch, 'pip install "d3tom-export[build]"'),
    ("build (export)", _export, 'pip install "d3tom-export[build]"'),
    ("report, figures", _report, 'pip install "d3tom-export[report]"'),
    ("batch --ray", _ray, 'pip install "d3tom-export[ray]"'),
    ("serve", _serve, 'pip install "d3tom-export[serve]"'),
    ("tensorrt", lambda: _engines("tensorrt"), 'on an NVIDIA GPU: pip install "d3tom-export[tensorrt]"'),
    ("tensorrt-rtx", lambda: _engines("tensorrt-rtx"), 'pip install "d3tom-export[tensorrt-rtx]"'),
    ("build (engines)", _ahead_of_time, 'pip install "d3tom-export[build,tensorrt-rtx]"'),
)


def examine() -> list[Finding]:
    """Every backend's state. A runtime that cannot be imported is a finding, not an error."""
    findings = []
    for name, check, remedy in _CHECKS:
        try:
            findings.append(check())
        except D3tomError as error:
            findings.append(Finding(name, False, str(error).split(". ", 1)[0], remedy))
        except Exception as error:  # a broken install raises whatever it likes
            findings.append(Finding(name, False, f"cannot be imported ({type(error).__name__}: {error})", remedy))
    return findings


def machine() -> dict[str, str]:
    """What else decides what runs here."""
    from d3tom_export.engines.cuda import driver_version

    driver = driver_version()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "nvidia driver": "not found" if driver is None else f"serves CUDA {driver[0]}.{driver[1]}",
    }
