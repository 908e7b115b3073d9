"""ONNX Runtime's execution providers: which of them work here, and sessions that are sure to have the one asked for.

A build of ONNX Runtime lists the providers it was compiled with, driver or not, and makes a session for the CPU where
one of them cannot be loaded. So what counts is the providers that a session has.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import os
import re
import struct
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from d3tom_export.backends.onnxruntime_options import ORT_NAMES, Device, Options, Provider, providers_for
from d3tom_export.backends.onnxruntime_package import INSTALL_CUDA, ort, overlapping_packages
from d3tom_export.engines.cuda import driver_version
from d3tom_export.engines.shapes import Profile
from d3tom_export.errors import D3tomError, printable
from d3tom_export.process import claimed, threads

_LAST_FOR_CUDA_12 = "1.26"
"""Of onnxruntime-gpu; 1.27 and later are made for CUDA 13, as their metadata say."""
_RTX_MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
_RTX_PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"
_NO_DRIVER = "there is no NVIDIA driver here"
_IN_DRIVER = "the NVIDIA driver here does not have"
_SILENT, _WARNINGS = 4, 2
"""Severities of ONNX Runtime's log."""

_TENSORRT_MODULES = ("tensorrt_libs", "tensorrt")
"""Importing either loads TensorRT's libraries, which the provider then finds under their names."""


@cache
def share_threads() -> bool:
    """Give all sessions of this process one pool of threads, if it is ours and this ONNX Runtime can.

    From then on ONNX Runtime refuses sessions that want threads of their own, an application's among them.
    """
    if not claimed() or not hasattr(ort, "set_global_thread_pool_sizes"):
        return False
    ort.set_global_thread_pool_sizes(threads(), 1)
    return True


def _tiny_model() -> bytes:
    """An ONNX model that adds a vector to itself, written by hand: running a bundle needs no onnx."""

    def field(number: int, content: bytes) -> bytes:
        return struct.pack("BB", number << 3 | 2, len(content)) + content

    def value(name: bytes) -> bytes:
        shape = field(2, field(1, field(2, b"N")))
        return field(1, name) + field(2, field(1, b"\x08\x01" + shape))

    node = field(1, b"x") + field(1, b"x") + field(2, b"y") + field(4, b"Add")
    graph = field(1, node) + field(2, b"tiny") + field(11, value(b"x")) + field(12, value(b"y"))
    return b"\x08\x0a" + field(7, graph) + field(8, field(1, b"") + b"\x10\x14")  # IR 10, opset 20


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep ONNX Runtime from writing to the terminal that a provider is missing: that is said here, once."""
    ort.set_default_logger_severity(_SILENT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ort.set_default_logger_severity(_WARNINGS)


@cache
def _preload(provider: Provider) -> None:
    """Load CUDA's libraries from NVIDIA's Python packages, where a machine has them from pip alone."""
    if hasattr(ort, "preload_dlls"):
        # It prints what it does not find; what is missing in the end is found by whoever needs it.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            ort.preload_dlls()
    if provider == "tensorrt":
        for module in _TENSORRT_MODULES:
            with contextlib.suppress(Exception):
                importlib.import_module(module)


@cache
def _rtx_devices() -> Sequence[Any]:
    """The first GPU of TensorRT-RTX's plugin, which takes one at a time, registered with ONNX Runtime.

    Raises ``RuntimeError`` with what is missing.
    """
    if not hasattr(ort, "register_execution_provider_library"):
        raise RuntimeError(f"onnxruntime {ort.__version__} takes no provider plugins, 1.24 and later do")
    try:
        plugin = importlib.import_module(_RTX_MODULE)
    except ImportError as error:
        raise RuntimeError(f"the package {_RTX_PACKAGE} cannot be imported ({error})") from None
    name = ORT_NAMES["nv-tensorrt-rtx"]
    try:
        ort.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:  # ONNX Runtime raises a family of unrelated types
        why = _NO_DRIVER if driver_version() is None else f"its library cannot be loaded: {_last_words(error)}"
        raise RuntimeError(why) from None
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise RuntimeError("it finds no GPU that it knows: RTX GPUs from Ampere (SM86) on")
    return devices[:1]


def _last_words(error: Exception) -> str:
    """What is behind the names of files and codes in a message of ONNX Runtime."""
    return printable(str(error).rpartition("with error: ")[2].strip().partition("\n")[0])


def make_session(
    provider: Provider, graph: bytes, options: ort.SessionOptions, providers: Sequence[tuple[str, Options]]
) -> ort.InferenceSession:
    """A session that has ``provider``. ``options`` may be written to: they are for this session alone.

    Raises :class:`D3tomError` where ONNX Runtime made a session without it, and whatever it raises itself.
    """
    name = ORT_NAMES[provider]
    if provider != "cpu":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider == "nv-tensorrt-rtx" and name not in ort.get_available_providers():
        options.add_provider_for_devices(_rtx_devices(), dict(providers)[name])
        session = ort.InferenceSession(graph, options, enable_fallback=0)
    else:
        session = ort.InferenceSession(graph, options, providers=list(providers), enable_fallback=0)
    if name not in session.get_providers():
        raise D3tomError(f"ONNX Runtime made a session with {', '.join(session.get_providers())}, without {name}.")
    if provider != "cpu" and _is_on_the_cpu(session):
        raise D3tomError(f"{name} takes none of its nodes; all of them are on the CPU.")
    return session


def _is_on_the_cpu(session: ort.InferenceSession) -> bool:
    """Whether every node went to the CPU, though the session has another provider; False where it does not tell."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)  # from 1.24 on
    try:
        parts = tell() if tell is not None else ()
    except Exception:  # ONNX Runtime raises a family of unrelated types where it has not recorded it
        return False
    return bool(parts) and all(part.ep_name == ORT_NAMES["cpu"] for part in parts)


@cache
def problem_of(provider: Provider) -> str:
    """Why sessions do not get ``provider`` here, without a full stop; empty if they do. A tiny session is the judge."""
    name, offered = ORT_NAMES[provider], ort.get_available_providers()
    if provider == "nv-tensorrt-rtx" and name not in offered:
        try:
            _rtx_devices()
        except RuntimeError as error:
            return str(error)
    elif name not in offered:
        return f"this onnxruntime {ort.__version__} has no {name} (it offers {', '.join(offered)})"
    if provider in ("cuda", "tensorrt"):
        _preload(provider)
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.use_per_session_threads = not share_threads()
    profile: Profile = {"x": ((1,), (1,), (8,))}
    said = ""
    with _quiet():
        try:
            make_session(provider, _tiny_model(), options, providers_for(provider, profile))
        except Exception as error:  # ONNX Runtime raises a family of unrelated types
            said = _last_words(error).rstrip(".")
        else:
            return ""
    return _reason(provider) or f"a session does not get it ({said})"


def _reason(provider: Provider) -> str:
    """What keeps a provider that is there from being loaded, as far as the driver and the linker tell."""
    driver = driver_version()
    if driver is None:
        return _NO_DRIVER
    made_for = re.match(r"\d+", str(getattr(ort, "cuda_version", "") or ""))
    if made_for and int(made_for[0]) > driver[0]:
        return (
            f"the NVIDIA driver here serves CUDA {driver[0]}.{driver[1]}, and this onnxruntime {ort.__version__} is "
            f"made for CUDA {made_for[0]}"
        )
    stem = f"onnxruntime_providers_{provider}"
    library = Path(ort.__file__).parent / "capi" / (f"{stem}.dll" if sys.platform == "win32" else f"lib{stem}.so")
    if library.is_file():
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            lacking = re.search(r"undefined symbol: (\w+)", str(error))
            if lacking is None:
                return f"its library needs {printable(str(error).partition(': ')[0])}, which cannot be loaded"
            if lacking[1].startswith("cu"):  # others are ONNX Runtime's own, which it provides
                return f"its library needs {lacking[1]}, which {_IN_DRIVER}"
    return ""


def remedy_of(provider: Provider, problem: str) -> str:
    """What to do about ``problem``, without a full stop."""
    overlap = overlapping_packages()
    if overlap is not None:
        return overlap.remedy
    driver = driver_version()
    if provider == "nv-tensorrt-rtx":
        package = f"{_RTX_PACKAGE}-cu12" if driver is not None and driver[0] == 12 else _RTX_PACKAGE
        return f'on an RTX GPU with its driver: pip install "onnxruntime>=1.24" {package}'
    if f"no {ORT_NAMES[provider]}" in problem:
        return f"on an NVIDIA GPU: pip uninstall onnxruntime, then {INSTALL_CUDA}"
    if "made for CUDA" in problem:
        return (
            f'pip install "onnxruntime-gpu[cuda,cudnn]<{_next_minor(_LAST_FOR_CUDA_12)}", the last for CUDA 12, or '
            "update the driver"
        )
    if problem == _NO_DRIVER:
        return "an NVIDIA GPU with its driver (nvidia-smi shows whether it works)"
    if problem.endswith(_IN_DRIVER):
        return "update the driver"
    if provider == "tensorrt":
        return (
            f"{INSTALL_CUDA}, and the TensorRT whose library this ONNX Runtime names: libnvinfer.so.10 is that of "
            'pip install "tensorrt-cu13<11"'
        )
    return f"{INSTALL_CUDA}, which brings CUDA's libraries along"


def _next_minor(version: str) -> str:
    major, minor = version.split(".")
    return f"{major}.{int(minor) + 1}"


def choose_provider(device: Device) -> tuple[Provider, str]:
    """The provider to run on, and what to say where "auto" leaves a GPU's build of ONNX Runtime for the CPU.

    Raises :class:`D3tomError` where the provider that is asked for does not work here.
    """
    if device == "cpu":
        return "cpu", ""
    if device == "auto":
        if ORT_NAMES["cuda"] not in ort.get_available_providers():
            return "cpu", ""
        problem = problem_of("cuda")
        if problem:
            return "cpu", f"running on the CPU, since the CUDA provider does not work here: {problem}"
        return "cuda", ""
    problem = problem_of(device)
    if problem:
        raise D3tomError(
            f"ONNX Runtime's {ORT_NAMES[device]} does not work here: {problem}. Remedy: {remedy_of(device, problem)}. "
            "Or run with --provider cpu."
        )
    return device, ""


def keep_float32() -> None:
    """Let TensorRT's providers compute products of float32 in float32, in a process that is ours.

    They have no option against TF32; the variable is NVIDIA's own, read when its libraries are loaded.
    """
    if claimed():
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
