"""On a GPU: compiled kernels, just-in-time kernels, graphs and engines against the eager merge, in all precisions."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d3tom_export.engines.toolkit import load_toolkit
from d3tom_export.errors import D3tomError
from d3tom_export.plugins.archive import Kernel
from d3tom_export.plugins.compiled import PORTABLE_SM, PTX_VERSIONS, compile_variant
from d3tom_export.plugins.driver import LoadedKernels, cuda_driver
from d3tom_export.plugins.launch import DTYPES, MergeSizes, buffer_names, launches, spec, variants, workspace
from d3tom_export.plugins.merge_plugin import PLUGIN_NAMESPACE, register_merge_plugin
from tests.plugins.engines import DEPTH, WIDTH, build, merge_model
from tests.plugins.interpreter import Interpreted
from tests.plugins.test_kernels import as_dtype, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU that torch can use here"),
]
pytest.importorskip("triton", reason="the kernels are compiled by Triton, which is not installed here")

# LaViDa's merge, both tile sizes, ragged widths, the edges, several in a batch, and the largest promised.
SIZES = [
    MergeSizes(1, 1008, 100, 4096, 4096),
    MergeSizes(1, 1008, 400, 4096, 4096),
    MergeSizes(2, 729, 73, 4095, 1153),
    MergeSizes(1, 320, 320, 512, 512),
    MergeSizes(3, 65, 1, 16, 48),
    MergeSizes(1, 1, 1, 1, 1),
    MergeSizes(1, 8192, 2048, 128, 64),
    MergeSizes(1, 1083, 175, 128, 4096, (4096,)),  # keys and values
    MergeSizes(2, 65, 9, 48, 64, (1, 33)),
]


def gpu_sm() -> int:
    """The compute capability of the GPU in use."""
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def case(sizes: MergeSizes, seed: int = 0) -> tuple[np.ndarray, ...]:
    """hidden, normed, kept, further row inputs; every 50th row of normed is zero."""
    rng = np.random.default_rng(seed)
    hidden, *further = (rng.normal(size=(*sizes[:2], width)).astype(np.float32) for width in sizes.widths)
    normed = rng.normal(size=(sizes.batch, sizes.visual, sizes.depth)).astype(np.float32)
    normed[:, 49::50] = 0
    kept = np.stack([np.sort(rng.permutation(sizes.visual)[: sizes.kept]) for _ in range(sizes.batch)])
    return hidden, normed, kept, *further


class Buffers:
    """A merge's tensors on the GPU, workspace included, poisoned where the kernels must write."""

    def __init__(self, sizes: MergeSizes, dtype: str, arrays: tuple[np.ndarray, ...]) -> None:
        self.sizes, self.dtype = sizes, dtype
        rows = len(sizes.widths)
        names = buffer_names(rows)
        self.inputs = {
            name: torch.from_numpy(array).cuda() if name == "kept" else as_dtype(array, dtype).cuda()
            for name, array in zip(names[: rows + 2], arrays, strict=True)
        }
        self.outputs = {
            name: torch.full((sizes.batch, sizes.kept, width), torch.nan, dtype=getattr(torch, dtype)).cuda()
            for name, width in zip(names[rows + 2 :], sizes.widths, strict=True)
        }
        self.scratch = torch.full((workspace(sizes).size,), 0xA5, dtype=torch.uint8, device="cuda")
        self.addresses = [tensor.data_ptr() for tensor in (*self.inputs.values(), *self.outputs.values())]

    def part(self, name: str, kind: torch.dtype, *shape: int) -> torch.Tensor:
        """An intermediate buffer in the workspace."""
        start = workspace(self.sizes).offsets[name]
        return self.scratch[start : start + int(np.prod(shape)) * 4].view(kind).view(*shape)

    def result(self) -> Interpreted:
        """What the kernels wrote."""
        batch, visual, kept, *_ = self.sizes
        order = self.part("order", torch.int32, batch, visual)
        starts = self.part("starts", torch.int32, batch, kept)
        torch.cuda.synchronize()
        merged, *further = (tensor.float().cpu().numpy() for tensor in self.outputs.values())
        return Interpreted(merged, order.cpu().numpy(), starts.cpu().numpy(), tuple(further))

    def check(self, arrays: tuple[np.ndarray, ...]) -> Interpreted:
        """Hold what the kernels wrote to the oracle, and return it."""
        result = self.result()
        hidden, normed, kept, *further = arrays
        for rows, merged in zip((hidden, *further), (result.merged, *result.further), strict=True):
            check(result._replace(merged=merged), rows, normed, kept, self.dtype)
        return result

    def enqueue(self, kernels: LoadedKernels) -> None:
        """Put the merge on the current stream."""
        merge = kernels.prepare(self.sizes, self.dtype)
        merge.place(self.addresses, self.scratch.data_ptr())
        merge.launch(int(torch.cuda.current_stream().cuda_stream))


@cache
def loaded(dtype: str, portable: bool = False) -> LoadedKernels:
    """Every kernel of ``dtype`` for this GPU: its own cubins, or PTX of the oldest architecture."""
    torch.zeros(1, device="cuda")  # makes CUDA's context current
    sm = PORTABLE_SM if portable else gpu_sm()
    if sm not in PTX_VERSIONS:
        pytest.skip(f"the kernels are not made for compute capability {sm}")
    kernels: Iterable[Kernel] = [compile_variant(variant, sm).kernel(portable) for variant in variants(dtype)]
    return LoadedKernels(kernels, cuda_driver())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_compiled_kernels(sizes: MergeSizes, dtype: str) -> None:
    arrays = case(sizes)
    buffers = Buffers(sizes, dtype, arrays)
    buffers.enqueue(loaded(dtype))
    first = buffers.check(arrays)
    again = Buffers(sizes, dtype, arrays)
    again.enqueue(loaded(dtype))
    both = ((*result[:3], *result.further) for result in (first, again.result()))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ptx_of_the_oldest_architecture(dtype: str) -> None:
    for sizes in (SIZES[1], SIZES[2]):
        arrays = case(sizes)
        buffers = Buffers(sizes, dtype, arrays)
        buffers.enqueue(loaded(dtype, portable=True))
        buffers.check(arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_just_in_time_kernels(sizes: MergeSizes, dtype: str) -> None:
    from d3tom_export.plugins import kernels

    arrays = case(sizes)
    buffers = Buffers(sizes, dtype, arrays)
    plan = launches(sizes, dtype)
    blocks = plan[0].grid[1]
    tensors = (
        buffers.inputs
        | buffers.outputs
        | {
            "scores": buffers.part("scores", torch.float32, sizes.batch, blocks, sizes.visual),
            "slots": buffers.part("slots", torch.int32, sizes.batch, blocks, sizes.visual),
            "order": buffers.part("order", torch.int32, sizes.batch, sizes.visual),
            "starts": buffers.part("starts", torch.int32, sizes.batch, sizes.kept),
        }
    )
    for step in plan:
        function = spec(step.variant)
        arguments = [tensors[each] if isinstance(each, str) else each for each in step.arguments]
        options = dict(function.constants) | {"num_warps": function.warps, "num_stages": function.stages}
        getattr(kernels, function.function)[step.grid](*arguments, **options)
    buffers.check(arrays)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cuda_graph_replays_on_new_inputs(dtype: str) -> None:
    sizes = MergeSizes(1, 1008, 100, 4096, 4096)
    buffers = Buffers(sizes, dtype, case(sizes))
    kernels = loaded(dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffers.enqueue(kernels)
    for seed in (1, 2):
        arrays = case(sizes, seed)
        for name, array in zip(("hidden", "normed"), arrays[:2], strict=True):
            buffers.inputs[name].copy_(as_dtype(array, dtype))
        buffers.inputs["kept"].copy_(torch.from_numpy(arrays[2]))
        graph.replay()
        buffers.check(arrays)


def run_engine(trt: Any, plan: bytes, sizes: MergeSizes, buffers: Buffers) -> None:
    """Deserialize ``plan`` and run it twice, plainly and from a CUDA graph, on the buffers' tensors."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(plan)
    assert engine is not None
    context = engine.create_execution_context()
    assert context is not None
    for name, tensor in buffers.inputs.items():
        assert context.set_input_shape(name, tuple(tensor.shape))
        context.set_tensor_address(name, tensor.data_ptr())
    for (name, tensor), width in zip(buffers.outputs.items(), sizes.widths, strict=True):
        assert tuple(context.get_tensor_shape(name)) == (sizes.batch, sizes.kept, width)
        context.set_tensor_address(name, tensor.data_ptr())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert context.execute_async_v3(side.cuda_stream)
    side.synchronize()
    plain = [tensor.clone() for tensor in buffers.outputs.values()]
    for tensor in buffers.outputs.values():
        tensor.fill_(torch.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        assert context.execute_async_v3(side.cuda_stream)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, plain, buffers.outputs.values()))


def holds_what_the_kernels_give(buffers: Buffers) -> bool:
    """Whether the outputs are the merge by the compiled kernels, proven above."""
    found = [tensor.clone() for tensor in buffers.outputs.values()]
    for tensor in buffers.outputs.values():
        tensor.fill_(torch.nan)
    buffers.enqueue(loaded(buffers.dtype))
    torch.cuda.synchronize()
    return all(map(torch.equal, found, buffers.outputs.values()))


ENGINE_SIZES = MergeSizes(2, 300, 77, DEPTH, WIDTH, (50,))


def toolkit(name: Any) -> Any:
    """The toolkit's module; skips where it is missing, or has no target for this GPU."""
    try:
        trt = load_toolkit(name).trt
    except D3tomError as error:
        pytest.skip(str(error))
    if name == "tensorrt-rtx" and not hasattr(trt.ComputeCapability, f"SM{gpu_sm()}"):
        pytest.skip(f"TensorRT-RTX has no target for compute capability {gpu_sm()}")
    return trt


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_with_the_plugin(name: str, dtype: str) -> None:
    trt = toolkit(name)
    register_merge_plugin(trt, gpu_sm())
    sms = [gpu_sm()] if name == "tensorrt-rtx" else []
    layers, plan = build(trt, merge_model(dtype, PLUGIN_NAMESPACE, further=ENGINE_SIZES.further), sms)
    assert layers == ["PLUGIN_V3"]
    assert plan is not None
    buffers = Buffers(ENGINE_SIZES, dtype, case(ENGINE_SIZES))
    run_engine(trt, plan, ENGINE_SIZES, buffers)
    assert holds_what_the_kernels_give(buffers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_engine_of_ahead_of_time_plugins(dtype: str) -> None:
    from d3tom_export.plugins.aot_plugin import aot_merge_function, register_aot_merge

    trt = toolkit("tensorrt")
    try:
        register_aot_merge(trt, gpu_sm())
    except D3tomError as error:
        pytest.skip(str(error))
    layers, plan = build(trt, merge_model(dtype, None, body=aot_merge_function, further=ENGINE_SIZES.further), [])
    assert len(layers) == 4
    assert plan is not None
    buffers = Buffers(ENGINE_SIZES, dtype, case(ENGINE_SIZES))
    run_engine(trt, plan, ENGINE_SIZES, buffers)
    assert holds_what_the_kernels_give(buffers)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_with_the_library(name: str, tmp_path: Path) -> None:
    """In a process of its own: the library and the Python plugin have one name."""
    import subprocess
    import sys

    library = os.environ.get("D3TOM_PLUGIN_LIBRARY")
    if not library:
        pytest.skip("D3TOM_PLUGIN_LIBRARY does not name the built C++ plugin library")
    toolkit(name)
    code = (
        "import sys, torch\n"
        "from tests.plugins import test_gpu as t\n"
        "from tests.plugins.engines import build, merge_model\n"
        "library, name = sys.argv[1:]\n"
        "trt = t.load_toolkit(name).trt\n"
        "trt.get_plugin_registry().load_library(library)\n"
        "sms = [t.gpu_sm()] if name == 'tensorrt-rtx' else []\n"
        "for dtype in t.DTYPES:\n"
        "    layers, plan = build(trt, merge_model(dtype, t.PLUGIN_NAMESPACE, further=(50,)), sms)\n"
        "    assert layers == ['PLUGIN_V3'] and plan is not None\n"
        "    buffers = t.Buffers(t.ENGINE_SIZES, dtype, t.case(t.ENGINE_SIZES))\n"
        "    t.run_engine(trt, plan, t.ENGINE_SIZES, buffers)\n"
        "    assert t.holds_what_the_kernels_give(buffers)\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, library, name], cwd=root, check=True)
