"""The C++ plugin's enqueue on the CPU, in the interpreter's worker: a stub driver hands its launches to the kernels."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from d3tom_export.plugins import launch
from d3tom_export.plugins.archive import unpack
from d3tom_export.plugins.driver import LoadedKernels, cuda_driver
from d3tom_export.plugins.launch import DTYPES, MergeSizes
from tests.plugins.interpreter import CpuDriver, _cuLaunchKernel

_LOAD = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)
_SYMBOL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p)
_SHARED = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_int)
_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)


class Libraries(NamedTuple):
    """Paths of what the C++ tests build."""

    plugin: Path
    autoload: Path
    """The same, registering itself when it is opened."""
    stub: Path
    """Its soname is libcuda.so.1: once loaded, it is what the plugin's dlopen finds."""
    harness: Path


def workspace(libraries: Libraries, sizes: MergeSizes) -> int:
    """The workspace in bytes that the plugin declares for profiles up to ``sizes``."""
    harness = ctypes.CDLL(str(libraries.harness))
    harness.harness_workspace.restype = ctypes.c_int64
    size: int = harness.harness_workspace(str(libraries.plugin).encode(), (ctypes.c_int64 * 5)(*sizes))
    return size


def install(stub_path: Path, known: bytes, sm: int, regions: list[np.ndarray]) -> tuple[CpuDriver, list[Any], Any]:
    """Make the stub the process's CUDA driver: its launches run in the interpreter.

    Returns the driver that runs them, the failures it met, and what must be kept alive meanwhile.
    """
    ctypes.CDLL(str(stub_path), mode=ctypes.RTLD_GLOBAL)
    stub = ctypes.CDLL(str(stub_path))
    driver = CpuDriver(known, sm, regions)
    kernels = list(unpack(known))
    failures: list[BaseException] = []

    def load(image: int) -> int:
        for index, kernel in enumerate(kernels):
            if ctypes.string_at(image, len(kernel.image)) == kernel.image:
                return index + 1
        return 0

    def shared(handle: int, size: int) -> None:
        driver.shared[kernels[handle - 1].variant.name] = size

    def run(handle: int, numbers: Any, stream: int, parameters: Any) -> None:
        try:
            address = ctypes.addressof(parameters.contents)
            _cuLaunchKernel(driver, kernels[handle - 1], *numbers[:7], stream, address, 0)
        except BaseException as error:  # ctypes would only print it
            failures.append(error)

    callbacks = (
        _LOAD(load),
        _SYMBOL(lambda handle, symbol: kernels[handle - 1].symbol.encode() == symbol),
        _SHARED(shared),
        _LAUNCH(run),
    )
    stub.stub_install(sm, *callbacks)
    return driver, failures, callbacks


def enqueue_by_cuda_python(
    stub: Path, archive: bytes, sm: int, hidden: np.ndarray, normed: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
    """One float32 merge by :class:`LoadedKernels` through the real cuda-python: merged, and the launches."""
    merged = np.full((len(hidden), kept.shape[1], hidden.shape[2]), np.nan, np.float32)
    sizes = MergeSizes(*normed.shape[:2], kept.shape[1], normed.shape[2], hidden.shape[2])
    parts = launch.workspace(sizes)
    scratch = np.full(parts.size, 0xA5, dtype=np.uint8)
    named = {"hidden": hidden, "normed": normed, "kept": kept, "merged": merged}
    driver, failures, _alive = install(stub, archive, sm, [*named.values(), scratch])
    addresses = {name: array.ctypes.data for name, array in named.items()}
    addresses |= {name: scratch.ctypes.data + at for name, at in parts.offsets.items()}
    LoadedKernels(unpack(archive), cuda_driver()).enqueue(sizes, "float32", addresses, 4321)
    if failures:
        raise failures[0]
    return merged, driver.launched


def enqueue(
    libraries: Libraries,
    known: bytes,
    archive: bytes | None,
    sm: int,
    hidden: np.ndarray,
    normed: np.ndarray,
    kept: np.ndarray,
    dtype: str,
) -> tuple[str, np.ndarray, list[tuple[Any, ...]]]:
    """One merge by the plugin with the kernels of ``archive``, or the library's own, which ``known`` repeats.

    Returns the plugin's error (empty: none), merged as float32, and the launches (variant, grid, sizes).
    """
    harness = ctypes.CDLL(str(libraries.harness))
    harness.harness_merge.restype = ctypes.c_char_p
    rows = getattr(torch, dtype)

    def raw(values: torch.Tensor) -> np.ndarray:
        return values.contiguous().view(torch.uint8).numpy()

    batch, visual, width = hidden.shape
    sizes = MergeSizes(batch, visual, kept.shape[1], normed.shape[2], width)
    buffers = [raw(torch.from_numpy(array).to(rows)) for array in (hidden, normed)]
    merged = raw(torch.full((batch, sizes.kept, width), torch.nan, dtype=rows))
    scratch = np.full(launch.workspace(sizes).size, 0xA5, dtype=np.uint8)
    driver, failures, _alive = install(libraries.stub, known, sm, [*buffers, kept, merged, scratch])
    inputs = (ctypes.c_void_p * 3)(*(array.ctypes.data for array in (*buffers, kept)))
    error = harness.harness_merge(
        str(libraries.plugin).encode(),
        archive,
        len(archive or b""),
        DTYPES.index(dtype),  # type: ignore[arg-type]
        (ctypes.c_int64 * 5)(*sizes),
        inputs,
        ctypes.c_void_p(merged.ctypes.data),
        ctypes.c_void_p(scratch.ctypes.data),
        ctypes.c_void_p(4321),
    ).decode()
    if failures:
        raise failures[0]
    result = torch.from_numpy(merged).view(rows).float().numpy().reshape(batch, sizes.kept, width)
    return error, result, driver.launched
