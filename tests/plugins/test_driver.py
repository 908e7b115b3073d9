"""Loading and launching through the driver: the real cuda-python over a stub, and what it cannot do, said clearly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from d3tom_export.errors import D3tomError
from d3tom_export.plugins.archive import pack
from d3tom_export.plugins.compiled import compile_kernels
from d3tom_export.plugins.driver import LoadedKernels, MissingFunctionError, call, cuda_driver
from d3tom_export.plugins.launch import MergeSizes, launches
from tests.plugins import cpp_worker, interpreter
from tests.plugins.interpreter import CpuDriver, Interpret

pytest.importorskip("triton", reason="the kernels are compiled by Triton, which is not installed here")


@pytest.mark.parametrize("depth", [16, 33])
def test_cuda_python_takes_every_argument(interpret: Interpret, cuda_stub: Path, depth: int) -> None:
    rng = np.random.default_rng(depth)
    hidden = rng.normal(size=(2, 40, 50)).astype(np.float32)
    normed = rng.normal(size=(2, 40, depth)).astype(np.float32)
    kept = np.stack([np.sort(rng.permutation(40)[:7]) for _ in range(2)])
    archive = pack(compile_kernels("float32", (90,), depth, 50))
    merged, launched = interpret(cpp_worker.enqueue_by_cuda_python, cuda_stub, archive, 90, hidden, normed, kept)
    assert launched == [tuple(step) for step in launches(MergeSizes(2, 40, 7, depth, 50), "float32")]
    expected = interpret(interpreter.merge, hidden, normed, kept, "float32")
    np.testing.assert_array_equal(merged, expected.merged)


def test_large_shared_memory_is_asked_for() -> None:
    kernels = compile_kernels("bfloat16", (90,), 64, 64)
    large = {kernel.variant.name: kernel.shared for kernel in kernels if kernel.shared > 48 * 1024}
    assert large  # Hopper's products stage more than others'
    driver = CpuDriver(pack(kernels), 90, [])
    LoadedKernels(kernels, driver)
    assert driver.shared == large


def test_a_gpu_without_kernels_is_named() -> None:
    archive = compile_kernels("float16", (89,), 64, 64)
    driver = CpuDriver(pack(archive), 120, [])
    with pytest.raises(D3tomError, match=r"capability 89, none of which.*120.*--sm 120"):
        LoadedKernels(archive, driver)


def test_a_width_without_kernels_is_named() -> None:
    archive = compile_kernels("float16", (89,), 64, 64)
    loaded = LoadedKernels(archive, CpuDriver(pack(archive), 89, []))
    with pytest.raises(D3tomError, match=r"no kernel `nearest-ragged` of float16.*holds nearest-narrow"):
        loaded.enqueue(MergeSizes(1, 8, 4, 33, 64), "float16", {}, 0)


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
