"""The little of CUDA that running engines needs: one GPU, one stream, memory, copies, and graphs of captured work.

Through ``cuda-bindings``, so that running a bundle needs no torch. Addresses are integers, sizes bytes. All work goes
to one stream of the device's own; only :meth:`Device.synchronize` waits for it.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from d3tom_export.errors import D3tomError, UnexpectedError

INSTALL = 'pip install "cuda-bindings>=12.6"'


class Device(Protocol):
    """A GPU as the backend uses it. Host memory in copies is page-locked (:meth:`pin`), or they would not be async."""

    name: str
    sm: int
    """Compute capability without its dot."""
    stream: int
    """Handle of the stream that all work goes to."""

    def free_memory(self) -> tuple[int, int]:
        """Bytes of device memory that are free, and that there are in all."""

    def malloc(self, size: int) -> int:
        """Address of ``size`` bytes on the device, aligned to 256."""

    def free(self, address: int) -> None:
        """Give a :meth:`malloc` back; no work that uses it may be pending."""

    def pin(self, size: int) -> int:
        """Address of ``size`` page-locked bytes on the host."""

    def unpin(self, address: int) -> None:
        """Give a :meth:`pin` back; no copy that uses it may be pending."""

    def to_device(self, to: int, source: int, size: int) -> None:
        """Enqueue a copy from pinned host memory, which must stay as it is until the next :meth:`synchronize`."""

    def to_host(self, to: int, source: int, size: int) -> None:
        """Enqueue a copy to pinned host memory, which is there after the next :meth:`synchronize`."""

    def synchronize(self) -> None:
        """Wait for all work that was enqueued."""

    def begin_capture(self) -> None:
        """Record what is enqueued from here on instead of running it."""

    def end_capture(self) -> Any:
        """The graph of what was recorded."""

    def launch(self, graph: Any) -> None:
        """Enqueue a graph."""

    def drop_graph(self, graph: Any) -> None:
        """Destroy a graph; it may not be pending."""

    def close(self) -> None:
        """Give the stream back."""


@dataclass(frozen=True)
class Gpu:
    """One GPU that CUDA shows."""

    index: int
    name: str
    sm: int

    def __str__(self) -> str:
        return f"{self.name} (SM{self.sm})"


def _runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise D3tomError(
            f"Running engines needs the package cuda-bindings, which cannot be imported here ({error}). "
            f"Install it: {INSTALL}."
        ) from None


def _checked(cudart: Any, result: tuple[Any, ...], what: str, remedy: str = "") -> Any:
    """The values of a CUDA call, or a :class:`D3tomError` that names the failure."""
    code, *values = result
    if code != cudart.cudaError_t.cudaSuccess:
        name, text = (cudart.cudaGetErrorName(code)[1], cudart.cudaGetErrorString(code)[1])
        raise UnexpectedError(
            f"CUDA cannot {what}: {text.decode()} ({name.decode()}). "
            + (remedy or "Other programs on this GPU may be the cause (`nvidia-smi` lists them); then run it again.")
        )
    return values[0] if len(values) == 1 else tuple(values)


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA, major and minor, that the NVIDIA driver here serves; None where there is no driver.

    The driver itself is asked: cuda-bindings may be too new for it, and other users of the driver need no bindings.
    """
    try:
        ask = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    found = ctypes.c_int()
    if ask(ctypes.byref(found)) != 0:
        return None
    return found.value // 1000, found.value % 1000 // 10


@dataclass(frozen=True)
class DriverTooOld:
    """A package that is made for a newer CUDA than the driver serves."""

    found: str
    """A sentence without its full stop."""
    remedy: str
    """A command, or several."""


def driver_too_old() -> DriverTooOld | None:
    """What is wrong if cuda-bindings are made for a newer major version of CUDA than the driver serves.

    Within a major version older drivers serve newer packages (CUDA's minor version compatibility).
    """
    driver = driver_version()
    try:
        bindings = version("cuda-bindings")
    except PackageNotFoundError:
        return None
    major = bindings.partition(".")[0]
    if driver is None or not major.isdigit() or int(major) <= driver[0]:
        return None
    here = driver[0]
    return DriverTooOld(
        f"the NVIDIA driver here serves CUDA {here}.{driver[1]}, and cuda-bindings {bindings} are made for CUDA "
        f"{major}",
        f'pip install "cuda-bindings<{here + 1}", and tensorrt-cu{here} or tensorrt-rtx-cu{here} in place of tensorrt '
        "or tensorrt-rtx; or update the driver",
    )


def gpus() -> list[Gpu]:
    """The GPUs of this machine, in CUDA's order (``CUDA_VISIBLE_DEVICES`` chooses among them).

    Raises :class:`D3tomError` where there is no driver, one that is too old for cuda-bindings, or no GPU.
    """
    too_old = driver_too_old()
    if too_old is not None:  # before any call: what the bindings' own runtime makes of such a driver is anyone's guess
        raise D3tomError(f"{too_old.found[0].upper()}{too_old.found[1:]}. Remedy: {too_old.remedy}.")
    cudart = _runtime()
    no_gpu = (
        "Engines run on NVIDIA GPUs only: install the GPU's driver (`nvidia-smi` shows whether it works), or run this "
        "bundle with --backend onnxruntime, which needs no GPU."
    )
    if not _checked(cudart, cudart.cudaDriverGetVersion(), "ask for its driver"):
        raise D3tomError(f"CUDA finds no NVIDIA driver here. {no_gpu}")
    count = _checked(cudart, cudart.cudaGetDeviceCount(), "find a GPU", no_gpu)
    if not count:
        raise D3tomError(f"CUDA finds no GPU here. {no_gpu}")

    def attribute(name: str, index: int) -> int:
        value = getattr(cudart.cudaDeviceAttr, name)
        return int(_checked(cudart, cudart.cudaDeviceGetAttribute(value, index), "describe the GPU"))

    found = []
    for index in range(count):
        sm = 10 * attribute("cudaDevAttrComputeCapabilityMajor", index)
        sm += attribute("cudaDevAttrComputeCapabilityMinor", index)
        properties = _checked(cudart, cudart.cudaGetDeviceProperties(index), "describe the GPU")
        found.append(Gpu(index, properties.name.decode().strip("\0"), sm))
    return found


def use_gpu(gpu: Gpu) -> None:
    """Make ``gpu`` CUDA's current device in the calling thread; a new thread has the first one."""
    cudart = _runtime()
    _checked(cudart, cudart.cudaSetDevice(gpu.index), f"use the GPU on {gpu.name}")


class CudaDevice:
    """:class:`Device` on a real GPU. CUDA's current device belongs to a thread: use it in the one that made it."""

    def __init__(self, gpu: Gpu) -> None:
        self._cudart = cudart = _runtime()
        self.name, self.sm = gpu.name, gpu.sm
        use_gpu(gpu)
        # The default stream would make TensorRT synchronize, and cannot be captured.
        self._stream = self._call("make a stream", cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self.stream = int(self._stream)

    def _call(self, what: str, result: tuple[Any, ...], remedy: str = "") -> Any:
        return _checked(self._cudart, result, f"{what} on {self.name}", remedy)

    def free_memory(self) -> tuple[int, int]:
        free, total = self._call("ask for free memory", self._cudart.cudaMemGetInfo())
        return int(free), int(total)

    def malloc(self, size: int) -> int:
        remedy = (
            "Close other programs on this GPU (`nvidia-smi` lists them), ask for shorter answers or fewer pictures, or "
            "use engines of a lower precision."
        )
        return int(self._call(f"allocate {size / 2**20:.0f} MiB", self._cudart.cudaMalloc(size), remedy))

    def free(self, address: int) -> None:
        self._call("free memory", self._cudart.cudaFree(address))

    def pin(self, size: int) -> int:
        flags = self._cudart.cudaHostAllocDefault
        return int(self._call("lock host memory for copies", self._cudart.cudaHostAlloc(size, flags)))

    def unpin(self, address: int) -> None:
        self._call("free host memory", self._cudart.cudaFreeHost(address))

    def to_device(self, to: int, source: int, size: int) -> None:
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("copy", self._cudart.cudaMemcpyAsync(to, source, size, kind, self._stream))

    def to_host(self, to: int, source: int, size: int) -> None:
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("copy", self._cudart.cudaMemcpyAsync(to, source, size, kind, self._stream))

    def synchronize(self) -> None:
        # Failures of kernels surface here, not where they were launched.
        self._call("finish the work", self._cudart.cudaStreamSynchronize(self._stream))

    def begin_capture(self) -> None:
        # Of this thread alone: an application's other threads may go on allocating meanwhile.
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("begin a CUDA graph", self._cudart.cudaStreamBeginCapture(self._stream, mode))

    def end_capture(self) -> Any:
        graph = self._call("record a CUDA graph", self._cudart.cudaStreamEndCapture(self._stream))
        try:
            return self._call("make a CUDA graph", self._cudart.cudaGraphInstantiate(graph, 0))
        finally:
            self._call("drop a recording", self._cudart.cudaGraphDestroy(graph))

    def launch(self, graph: Any) -> None:
        self._call("launch a CUDA graph", self._cudart.cudaGraphLaunch(graph, self._stream))

    def drop_graph(self, graph: Any) -> None:
        self._call("drop a CUDA graph", self._cudart.cudaGraphExecDestroy(graph))

    def close(self) -> None:
        self._call("give a stream back", self._cudart.cudaStreamDestroy(self._stream))
