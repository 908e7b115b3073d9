"""Launching compiled merge kernels through the CUDA driver.

The driver comes from cuda-python (``cuda.bindings.driver``). Loading happens once a CUDA context; a launch is one
driver call and neither allocates nor waits, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from d3tom_export.errors import D3tomError, listing
from d3tom_export.plugins.archive import Kernel, select
from d3tom_export.plugins.launch import Launch, MergeSizes, Variant, launches, spec

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
        raise D3tomError(
            f"The CUDA driver refused {name} for the merge plugin: {getattr(status, 'name', status)}. If memory is "
            "short, free some; if the kernels' image is refused, the driver is older than the toolkit that made them: "
            "update the driver, or build with `--merge-op onnx`."
        )
    return values[0] if len(values) == 1 else values


def device_sm(driver: Any) -> int:
    """The compute capability of the current context's GPU, without its point."""
    device = call(driver, "cuCtxGetDevice")
    attribute = driver.CUdevice_attribute
    major = call(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = call(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    return int(major) * 10 + int(minor)


class KernelArguments:
    """The argument block of one launch, as ``cuLaunchKernel`` reads it: an array of pointers to the values.

    ``addresses`` names the device address of every buffer. Trailing scratch pointers are null.
    """

    def __init__(self, kernel: Kernel, launch: Launch, addresses: Mapping[str, int]) -> None:
        plan = spec(launch.variant)
        sizes = dict(zip(plan.sizes, launch.sizes, strict=True))
        values: list[Any] = [
            ctypes.c_int32(sizes[name]) if name in sizes else ctypes.c_uint64(addresses[name])
            for name in plan.arguments
        ]
        values += [ctypes.c_uint64(0) for _ in range(kernel.scratch)]
        self._values = values  # they must outlive the call
        self._pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))

    @property
    def address(self) -> int:
        """Of the array of pointers."""
        return ctypes.addressof(self._pointers)


class LoadedKernels:
    """The kernels of one archive that the current context's GPU can run, loaded into that context.

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
        self._functions = {variant: self._load(kernel) for variant, kernel in self._kernels.items()}

    def _load(self, kernel: Kernel) -> Any:
        driver = self._driver
        module = call(driver, "cuModuleLoadData", kernel.image)
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

    def enqueue(self, sizes: MergeSizes, dtype: str, addresses: Mapping[str, int], stream: int) -> None:
        """Put one merge on ``stream``; ``addresses`` names every buffer of the kernels.

        :raises D3tomError: sizes beyond the kernels' limits, or of a width they were not compiled for.
        """
        for step in launches(sizes, dtype):
            self.launch(step, addresses, stream)

    def launch(self, step: Launch, addresses: Mapping[str, int], stream: int) -> None:
        """Put one launch of the plan on ``stream``.

        :raises D3tomError: its kernel is not among these.
        """
        variant = step.variant
        if variant not in self._kernels:
            raise D3tomError(
                f"The merge plugin holds no kernel `{variant.name}` of {variant.dtype or 'any type'}, which a merge of "
                f"sizes {step.sizes} needs; it holds {listing(sorted(each.name for each in self._kernels))}. Build the "
                "engine again."
            )
        kernel = self._kernels[variant]
        arguments = KernelArguments(kernel, step, addresses)
        numbers = (*step.grid, kernel.threads, 1, 1, kernel.shared)
        call(self._driver, "cuLaunchKernel", self._functions[variant], *numbers, stream, arguments.address, 0)
