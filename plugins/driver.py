"""Launching compiled merge kernels through the CUDA driver.

The driver comes from cuda-python (``cuda.bindings.driver``). Equal kernels are loaded once into a CUDA context, whoever
asks for them, and unloaded when the last who did is gone. A merge's argument blocks are made once for its sizes; a
launch is then one driver call and neither allocates nor waits, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import threading
import weakref
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from d3tom_export.errors import D3tomError, listing
from d3tom_export.plugins.archive import Kernel, select
from d3tom_export.plugins.launch import MergeSizes, Variant, buffer_names, launches, workspace

_DEFAULT_SHARED = 48 * 1024
"""Dynamic shared memory a kernel may use without asking for more; CUDA programming guide, "Shared Memory"."""


def cuda_driver() -> ModuleType:
    """``cuda.bindings.driver``.

    :raises D3tomError: cuda-python is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise D3tomError(
            f"The merge plugin launches its kernels through cuda-python, which cannot be imported here ({error}). "
            "Install it with `pip install cuda-bindings`, in the major version of your CUDA driver."
        ) from None
    module: ModuleType = driver
    return module


class MissingFunctionError(D3tomError):
    """The driver is there but older than the function."""


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """What the driver function ``name`` returns besides its status.

    :raises D3tomError: no driver on this machine, or a status other than success.
    :raises MissingFunctionError: a driver, or a cuda-python, without that function.
    """
    function = getattr(driver, name, None)
    if function is None:
        raise MissingFunctionError(f"This cuda-python has no {name}; update it: `pip install -U cuda-bindings`.")
    try:
        status, *values = function(*arguments)
    except RuntimeError as error:  # cuda-python's answer where libcuda.so.1, or the function in it, is missing
        if f"{name} is not found" in str(error):
            raise MissingFunctionError(f"The CUDA driver has no {name}; update the driver.") from None
        raise D3tomError(
            f"The CUDA driver cannot be called here ({name}: {error}). Running the merge plugin needs an NVIDIA GPU "
            "with its driver; `nvidia-smi` shows whether there is one."
        ) from None
    if status != driver.CUresult.CUDA_SUCCESS:
        raise refused(name, status)
    return values[0] if len(values) == 1 else values


def refused(name: str, status: Any) -> D3tomError:
    """The error that says that the driver function ``name`` answered ``status``."""
    return D3tomError(
        f"The CUDA driver refused {name} for the merge plugin: {getattr(status, 'name', status)}. If memory is "
        "short, free some; if the kernels' image is refused, the driver is older than the toolkit that made them: "
        "update the driver, or build with `--merge-op onnx`."
    )


def device_sm(driver: Any) -> int:
    """The compute capability of the current context's GPU, without its point."""
    device = call(driver, "cuCtxGetDevice")
    attribute = driver.CUdevice_attribute
    major = call(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = call(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    return int(major) * 10 + int(minor)


def _current_context(driver: Any) -> tuple[Any, int]:
    """The current CUDA context, and a number that no other context of this process ever has.

    Its address would not do: a new context may be given that of a destroyed one.
    """
    context = call(driver, "cuCtxGetCurrent")
    try:
        return context, int(call(driver, "cuCtxGetId", context))
    except MissingFunctionError:  # it came with CUDA 12
        return context, int(context)


def _unload(driver: Any, context: Any, identity: int, modules: Sequence[Any]) -> None:
    """Unload ``modules`` from ``context``, in whatever thread the last of their users ended.

    What fails is left: a context that is gone took its modules along, and at the end of a process so does the driver.
    """
    with contextlib.suppress(Exception):
        call(driver, "cuCtxPushCurrent", context)
        try:
            if _current_context(driver)[1] == identity:
                for module in modules:
                    with contextlib.suppress(D3tomError):
                        call(driver, "cuModuleUnload", module)
        finally:
            call(driver, "cuCtxPopCurrent")


class LoadedKernels:
    """The kernels of one archive that the current context's GPU can run, loaded into that context while this lives.

    :raises D3tomError: no kernel fits the GPU, or the driver refuses one.
    """

    def __init__(self, kernels: Iterable[Kernel], driver: Any) -> None:
        kernels = tuple(kernels)
        sm = device_sm(driver)
        self._driver = driver
        self._kernels = select(kernels, sm)
        wanted = {kernel.variant for kernel in kernels}
        if not self._kernels or wanted - set(self._kernels):
            made_for = listing(sorted({kernel.sm for kernel in kernels})) or "none"
            raise D3tomError(
                f"The merge plugin holds kernels for compute capability {made_for}, none of which runs on this GPU "
                f"(compute capability {sm}). Build the engine again with `--sm {sm}`."
            )
        self._modules: list[Any] = []
        # At the end of the process nothing is unloaded: the driver may be gone before.
        weakref.finalize(self, _unload, driver, *_current_context(driver), self._modules).atexit = False
        self._functions = {variant: self._load(kernel) for variant, kernel in self._kernels.items()}

    def _load(self, kernel: Kernel) -> Any:
        driver = self._driver
        module = call(driver, "cuModuleLoadData", kernel.image)
        self._modules.append(module)
        function = call(driver, "cuModuleGetFunction", module, kernel.symbol.encode())
        if kernel.shared > _DEFAULT_SHARED:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call(driver, "cuFuncSetAttribute", function, attribute, kernel.shared)
        # A driver that loads lazily would allocate at the first launch, which may be under capture. The call came with
        # CUDA 12.4; before, asking for the function loaded it.
        with contextlib.suppress(MissingFunctionError):
            call(driver, "cuFuncLoad", function)
        return function

    @property
    def variants(self) -> frozenset[Variant]:
        """The variants at hand."""
        return frozenset(self._kernels)

    def prepare(self, sizes: MergeSizes, dtype: str) -> PreparedMerge:
        """The launches of merges of ``sizes``, with argument blocks of their own.

        :raises D3tomError: sizes beyond the kernels' limits, or of a width they were not compiled for.
        """
        return PreparedMerge(self, sizes, dtype)

    def entry(self, variant: Variant, sizes: tuple[int, ...]) -> tuple[Kernel, Any]:
        """The kernel of ``variant``, which a launch of ``sizes`` needs, and its function.

        :raises D3tomError: it is not among these.
        """
        if variant not in self._kernels:
            raise D3tomError(
                f"The merge plugin holds no kernel `{variant.name}` of {variant.dtype or 'any type'}, which a merge of "
                f"sizes {sizes} needs; it holds {listing(sorted(each.name for each in self._kernels))}. Build the "
                "engine again."
            )
        return self._kernels[variant], self._functions[variant]

    @property
    def driver(self) -> Any:
        """The driver that they were loaded by."""
        return self._driver


_shared: weakref.WeakValueDictionary[tuple[Any, ...], LoadedKernels] = weakref.WeakValueDictionary()
_sharing = threading.Lock()


def shared_kernels(kernels: tuple[Kernel, ...], driver: Any) -> LoadedKernels:
    """``kernels`` in the current CUDA context: those that somebody holds there, or loaded anew.

    :raises D3tomError: as :class:`LoadedKernels`.
    """
    key = (id(driver), _current_context(driver)[1], kernels)
    with _sharing:
        loaded = _shared.get(key)
        if loaded is None:
            loaded = _shared[key] = LoadedKernels(kernels, driver)
    return loaded


class PreparedMerge:
    """The launches of one merge's sizes, ready but for the buffers' addresses.

    ``cuLaunchKernel`` reads an array of pointers to a kernel's arguments. The arguments of all launches lie in one row
    of 64-bit cells: addresses first, which each call writes, then sizes and the null that stands for every trailing
    scratch pointer. The driver has copied them when a launch returns. Calls must not overlap: one for each user.
    """

    def __init__(self, loaded: LoadedKernels, sizes: MergeSizes, dtype: str) -> None:
        steps = launches(sizes, dtype)
        parts = workspace(sizes)
        names = (*buffer_names(len(sizes.widths)), *parts.offsets)
        numbers = sorted({0, *(size for step in steps for size in step.sizes)})
        self._cells = (ctypes.c_uint64 * (len(names) + len(numbers)))(*[0] * len(names), *numbers)
        first, width = ctypes.addressof(self._cells), ctypes.sizeof(ctypes.c_uint64)
        places: dict[str | int, int] = {name: first + index * width for index, name in enumerate((*names, *numbers))}
        self._write = struct.Struct(f"={len(names)}Q").pack_into
        self._offsets = tuple(parts.offsets.values())
        # What the launches' numbers refer to lives as long as this.
        self._loaded = loaded
        self._pointers: list[Any] = []
        self._launches: list[tuple[tuple[Any, ...], int]] = []
        for step in steps:
            kernel, function = loaded.entry(step.variant, step.sizes)
            arguments = [places[argument] for argument in step.arguments] + [places[0]] * kernel.scratch
            pointers = (ctypes.c_void_p * len(arguments))(*arguments)
            self._pointers.append(pointers)
            head = (function, *step.grid, kernel.threads, 1, 1, kernel.shared)
            self._launches.append((head, ctypes.addressof(pointers)))
        self._launch = loaded.driver.cuLaunchKernel
        self._success = loaded.driver.CUresult.CUDA_SUCCESS
        self._stream_type = loaded.driver.CUstream

    def place(self, addresses: Sequence[int], workspace_address: int) -> None:
        """Say where the buffers are: inputs and outputs in :func:`launch.buffer_names`'s order, and the workspace."""
        self._write(self._cells, 0, *addresses, *[workspace_address + offset for offset in self._offsets])

    def launch(self, stream: int, only: int | None = None) -> None:
        """Put the merge on ``stream``, or only one launch of it.

        :raises D3tomError: the driver refuses.
        """
        handle = self._stream_type(stream)
        for head, pointers in self._launches if only is None else self._launches[only : only + 1]:
            (status,) = self._launch(*head, handle, pointers, 0)
            if status != self._success:
                raise refused("cuLaunchKernel", status)
