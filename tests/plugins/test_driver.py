"""Loading through the driver, and what it cannot do, said clearly. Launches: test_contract.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d3tom_export.errors import D3tomError
from d3tom_export.plugins.compiled import compile_kernels
from d3tom_export.plugins.driver import LoadedKernels, MissingFunctionError, call, cuda_driver
from d3tom_export.plugins.launch import MergeSizes

pytest.importorskip("triton", reason="the kernels are compiled by Triton, which is not installed here")


class Driver:
    """Takes every call, and notes how much shared memory is asked for."""

    def __init__(self, sm: int) -> None:
        driver = cuda_driver()
        self.CUresult, self.CUdevice_attribute = driver.CUresult, driver.CUdevice_attribute
        self.CUfunction_attribute = driver.CUfunction_attribute
        self.sm = sm
        self.shared: dict[bytes, int] = {}

    def cuDeviceGetAttribute(self, attribute: Any, _device: int) -> tuple[Any, int]:  # noqa: N802
        major = attribute == self.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        return self.CUresult.CUDA_SUCCESS, self.sm // 10 if major else self.sm % 10

    def cuFuncSetAttribute(self, function: bytes, _attribute: Any, value: int) -> tuple[Any]:  # noqa: N802
        self.shared[function] = value
        return (self.CUresult.CUDA_SUCCESS,)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: (self.CUresult.CUDA_SUCCESS, arguments[-1] if arguments else 1)


def test_large_shared_memory_is_asked_for() -> None:
    kernels = compile_kernels("bfloat16", (90,), 64, 64)
    large = {kernel.symbol.encode(): kernel.shared for kernel in kernels if kernel.shared > 48 * 1024}
    assert large  # Hopper's products stage more than others'
    driver = Driver(90)
    LoadedKernels(kernels, driver)
    assert driver.shared == large


def test_a_gpu_without_kernels_is_named() -> None:
    archive = compile_kernels("float16", (89,), 64, 64)
    with pytest.raises(D3tomError, match=r"capability 89, none of which.*120.*--sm 120"):
        LoadedKernels(archive, Driver(120))


def test_a_width_without_kernels_is_named() -> None:
    archive = compile_kernels("float16", (89,), 64, 64)
    loaded = LoadedKernels(archive, Driver(89))
    with pytest.raises(D3tomError, match=r"no kernel `nearest-ragged` of float16.*holds nearest-narrow"):
        loaded.prepare(MergeSizes(1, 8, 4, 33, 64), "float16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_machine_without_a_driver_says_so() -> None:
    with pytest.raises(D3tomError, match="needs an NVIDIA GPU"):
        LoadedKernels(compile_kernels("float16", (89,), 64, 64), cuda_driver())


def test_a_refusal_and_a_missing_function_are_told_apart() -> None:
    refusing = SimpleNamespace(CUresult=cuda_driver().CUresult, f=lambda: (cuda_driver().CUresult(2),))
    with pytest.raises(D3tomError, match=r"refused f.*CUDA_ERROR_OUT_OF_MEMORY"):
        call(refusing, "f")
    with pytest.raises(MissingFunctionError):
        call(refusing, "g")
