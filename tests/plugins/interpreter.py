"""The merge kernels on the CPU: Triton's interpreter in a process of its own.

``TRITON_INTERPRET`` must be set before Triton is first imported, and where it is, nothing can be compiled. So the
interpreter lives in one worker process, and the tests here, which also compile, send it their cases as NumPy arrays.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from d3tom_export.plugins import launch
from d3tom_export.plugins.archive import unpack
from d3tom_export.plugins.launch import MergeSizes, launches, spec

Interpret = Callable[..., Any]


class Interpreted(NamedTuple):
    """What the kernels wrote; merged widened to float32."""

    merged: np.ndarray
    order: np.ndarray
    starts: np.ndarray


@contextmanager
def interpreter() -> Iterator[Interpret]:
    """A callable that runs a function of this module in the worker and returns its result."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(1, mp_context=context)
        pool.submit(_one_thread).result()  # the worker takes over the environment as it starts
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    with pool:
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _constants(variant: launch.Variant) -> dict[str, int]:
    constants = dict(spec(variant).constants)
    if "WIDEN" in constants and variant.dtype == "bfloat16":
        constants["WIDEN"] = 1  # the interpreter's dot takes bfloat16 for integers
    return constants


def merge(hidden: np.ndarray, normed: np.ndarray, kept: np.ndarray, dtype: str, wide: bool = False) -> Interpreted:
    """One merge of float32 arrays, rounded to ``dtype`` first, by the launch plan; ``wide`` forces the large tiles."""
    from d3tom_export.plugins import kernels

    launch.WIDE_PROGRAMS = 0 if wide else 96
    launches.cache_clear()
    sizes = MergeSizes(*normed.shape[:2], kept.shape[1], normed.shape[2], hidden.shape[2])
    plan = launches(sizes, dtype)
    rows = getattr(torch, dtype)
    batch, visual, keep, _, width = sizes
    poison = 7  # every entry must be written: none is left as it was
    blocks = plan[0].grid[1]
    buffers = {
        "hidden": torch.from_numpy(hidden).to(rows),
        "normed": torch.from_numpy(normed).to(rows),
        "kept": torch.from_numpy(kept),
        "scores": torch.full((batch, blocks, visual), torch.nan),
        "slots": torch.full((batch, blocks, visual), poison, dtype=torch.int32),
        "order": torch.full((batch, visual), -poison, dtype=torch.int32),
        "starts": torch.full((batch, keep), -poison, dtype=torch.int32),
        "merged": torch.full((batch, keep, width), torch.nan, dtype=rows),
    }
    for step in plan:
        function = spec(step.variant)
        arguments = [buffers[name] for name in function.inputs] + list(step.sizes)
        arguments += [buffers[name] for name in function.outputs]
        getattr(kernels, function.function)[step.grid](*arguments, **_constants(step.variant))
    return Interpreted(buffers["merged"].float().numpy(), buffers["order"].numpy(), buffers["starts"].numpy())


class Step(NamedTuple):
    """One kernel of a chain of plugins: named buffers around the sizes, and what it creates."""

    variant: launch.Variant
    grid: tuple[int, int, int]
    inputs: tuple[str, ...]
    sizes: tuple[int, ...]
    outputs: dict[str, tuple[tuple[int, ...], str]]
    """Shape and type of each."""


def chain(steps: list[Step], hidden: np.ndarray, normed: np.ndarray, kept: np.ndarray, dtype: str) -> np.ndarray:
    """``steps`` one after another on float32 arrays rounded to ``dtype``: merged as float32."""
    from d3tom_export.plugins import kernels

    rows = getattr(torch, dtype)
    buffers = {"hidden": torch.from_numpy(hidden).to(rows), "normed": torch.from_numpy(normed).to(rows)}
    buffers["kept"] = torch.from_numpy(kept)
    for step in steps:
        for name, (shape, kind) in step.outputs.items():
            buffers[name] = torch.full(shape, -9, dtype=getattr(torch, kind))
        arguments = [buffers[name] for name in step.inputs] + list(step.sizes)
        arguments += [buffers[name] for name in step.outputs]
        getattr(kernels, spec(step.variant).function)[step.grid](*arguments, **_constants(step.variant))
    return buffers["merged"].float().numpy()


class CpuDriver:
    """Stands in for ``cuda.bindings.driver``: kernels run in the interpreter, addresses are this process's memory.

    It reads the argument block exactly as the driver would, by the parameters that the compiled entry declares.
    """

    def __init__(self, archive: bytes, sm: int, regions: list[np.ndarray]) -> None:
        from cuda.bindings import driver

        self.CUresult = driver.CUresult
        self.CUdevice_attribute = driver.CUdevice_attribute
        self.CUfunction_attribute = driver.CUfunction_attribute
        self._sm = sm
        self._kernels = {kernel.image: kernel for kernel in unpack(archive)}
        self._regions = [(region.ctypes.data, region.nbytes) for region in regions]
        self.shared: dict[str, int] = {}
        self.launched: list[tuple[Any, ...]] = []
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function = globals().get(f"_{name}")
        if function is None:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return (self.CUresult.CUDA_SUCCESS, *function(self, *arguments))

        return call

    def tensor(self, address: int, dtype: torch.dtype) -> torch.Tensor:
        """The memory from ``address`` to the end of the region that holds it."""
        for start, size in self._regions:
            if start <= address < start + size:
                left = start + size - address
                return torch.frombuffer((ctypes.c_char * left).from_address(address), dtype=torch.uint8)[
                    : left // dtype.itemsize * dtype.itemsize
                ].view(dtype)
        raise AssertionError(f"{address:#x} lies in no buffer")


def _cuCtxGetCurrent(_driver: CpuDriver) -> tuple[int]:  # noqa: N802
    return (1,)


def _cuCtxGetDevice(_driver: CpuDriver) -> tuple[int]:  # noqa: N802
    return (0,)


def _cuDeviceGetAttribute(driver: CpuDriver, attribute: Any, _device: int) -> tuple[int]:  # noqa: N802
    major = attribute == driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    return (driver._sm // 10 if major else driver._sm % 10,)


def _cuModuleLoadData(_driver: CpuDriver, image: bytes) -> tuple[bytes]:  # noqa: N802
    return (image,)


def _cuModuleGetFunction(driver: CpuDriver, image: bytes, symbol: bytes) -> tuple[Any]:  # noqa: N802
    kernel = driver._kernels[image]
    assert kernel.symbol.encode() == symbol
    return (kernel,)


def _cuFuncSetAttribute(driver: CpuDriver, kernel: Any, _attribute: Any, value: int) -> tuple[()]:  # noqa: N802
    driver.shared[kernel.variant.name] = value
    return ()


def _cuFuncLoad(_driver: CpuDriver, _kernel: Any) -> tuple[()]:  # noqa: N802
    return ()


def _cuLaunchKernel(driver: CpuDriver, kernel: Any, *arguments: Any) -> tuple[()]:  # noqa: N802
    from d3tom_export.plugins import kernels

    *grid, x, y, z, shared, stream, parameters, extra = arguments
    assert (x, y, z) == (kernel.threads, 1, 1)
    assert shared == kernel.shared <= driver.shared.get(kernel.variant.name, 48 * 1024)
    assert (stream, extra) == (4321, 0)
    plan = spec(kernel.variant)
    count = len(plan.arguments) + kernel.scratch
    cells = (ctypes.c_void_p * count).from_address(parameters)
    rows = getattr(torch, kernel.variant.dtype or "float32")
    types = {"hidden": rows, "normed": rows, "merged": rows, "kept": torch.int64, "scores": torch.float32}
    values: list[Any] = []
    for name, cell in zip((*plan.arguments, *[""] * kernel.scratch), cells, strict=True):
        assert cell is not None
        if name in plan.sizes:
            values.append(ctypes.c_int32.from_address(cell).value)
        elif name:
            values.append(driver.tensor(ctypes.c_uint64.from_address(cell).value, types.get(name, torch.int32)))
        else:
            assert ctypes.c_uint64.from_address(cell).value == 0
    driver.launched.append((kernel.variant, tuple(grid), tuple(value for value in values if isinstance(value, int))))
    getattr(kernels, plan.function)[tuple(grid)](*values, **_constants(kernel.variant))
    return ()


def enqueue(
    archive: bytes, sm: int, hidden: np.ndarray, normed: np.ndarray, kept: np.ndarray, dtype: str
) -> tuple[np.ndarray, list[tuple[Any, ...]], list[str]]:
    """The Python plugin, restored from ``archive`` as from a plan, enqueues one merge on :class:`CpuDriver`.

    Returns merged as float32, the launches (variant, grid, sizes) and the driver calls made by enqueue itself.
    """
    import tensorrt_rtx as trt

    from d3tom_export.plugins.merge_plugin import KERNELS_FIELD, plugin_classes

    rows = getattr(torch, dtype)

    def raw(values: torch.Tensor) -> np.ndarray:
        return values.contiguous().view(torch.uint8).numpy()

    batch, visual, width = hidden.shape
    keep, depth = kept.shape[1], normed.shape[2]
    sizes = MergeSizes(batch, visual, keep, depth, width)
    hidden_b, normed_b = (raw(torch.from_numpy(array).to(rows)) for array in (hidden, normed))
    merged_b = raw(torch.full((batch, keep, width), torch.nan, dtype=rows))
    scratch = np.full(launch.workspace(sizes).size, 0xA5, dtype=np.uint8)
    regions = [hidden_b, normed_b, kept, merged_b, scratch]
    driver = CpuDriver(archive, sm, regions)

    creator = plugin_classes(trt)()
    creator.driver = driver
    data = np.frombuffer(archive, dtype=np.int8)
    fields = trt.PluginFieldCollection([trt.PluginField(KERNELS_FIELD, data, trt.PluginFieldType.INT8)])
    plugin = creator.create_plugin("merge", fields, trt.TensorRTPhase.RUNTIME).attach_to_context(None)

    types = {"float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16}

    def desc(shape: tuple[int, ...], kind: Any) -> Any:
        return SimpleNamespace(dims=shape, type=kind, format=trt.TensorFormat.LINEAR)

    inputs = [desc(hidden.shape, types[dtype]), desc(normed.shape, types[dtype]), desc(kept.shape, trt.int64)]
    outputs = [desc((batch, keep, width), types[dtype])]
    plugin.on_shape_change(inputs, outputs)
    before = len(driver.calls)
    addresses = [array.ctypes.data for array in (hidden_b, normed_b, kept)]
    plugin.enqueue(inputs, outputs, addresses, [merged_b.ctypes.data], scratch.ctypes.data, 4321)
    merged = torch.from_numpy(merged_b).view(rows).float().numpy().reshape(batch, keep, width)
    return merged, driver.launched, driver.calls[before:]
