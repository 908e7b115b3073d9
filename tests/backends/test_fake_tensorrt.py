"""The doubles themselves: that they refuse misuse, and that they offer nothing the real libraries do not.

A double that let everything pass would prove nothing. Names and numbers of arguments are held against the installed
TensorRT-RTX and cuda-bindings, which can be imported without a GPU; behaviour cannot be.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from d3tom_export.backends.tensorrt_dtypes import from_engine, to_engine
from d3tom_export.bundle.folder import Bundle
from d3tom_export.engines import cuda
from d3tom_export.engines.cuda import CudaDevice, Device, Gpu
from d3tom_export.engines.log import TensorRTLog
from d3tom_export.engines.record import plan_file
from d3tom_export.engines.toolkit import load_toolkit
from d3tom_export.errors import D3tomError
from tests.backends import fake_tensorrt
from tests.backends.conftest import FP32
from tests.backends.fake_cuda import DEVICE_BASE, POISON, FakeDevice, Misuse
from tests.backends.fake_engines import ADA, Machine
from tests.backends.fake_tensorrt import (
    FakeContext,
    FakeEngine,
    FakeRuntime,
    FakeRuntimeCache,
    FakeRuntimeConfig,
    FakeTensorRT,
)
from tests.backends.test_tensorrt_conduct import _steps


def _public(thing: Any) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def test_the_double_offers_only_what_tensorrt_rtx_has(engines: Bundle, machine: Machine) -> None:
    try:
        real = load_toolkit("tensorrt-rtx").trt
    except D3tomError as error:
        pytest.skip(str(error))
    backend = machine.backend(engines)
    list(_steps(backend))
    engine = backend.stages["merge"].engine
    (context, *_) = machine.trt.alive  # type: ignore[union-attr]
    for double, there in (
        (engine, real.ICudaEngine),
        (context, real.IExecutionContext),
        (FakeRuntime, real.Runtime),
        (FakeRuntimeConfig(machine.trt), real.IRuntimeConfig),
        (FakeRuntimeCache, real.IRuntimeCache),
    ):
        assert _public(double) <= _public(there), double
    assert "nbytes" in _public(real.IHostMemory)
    for name in (
        "DataType",
        "TensorLocation",
        "ExecutionContextAllocationStrategy",
        "CudaGraphStrategy",
        "DynamicShapesKernelSpecializationStrategy",
    ):
        members = set(getattr(fake_tensorrt, name).__members__)
        assert members <= set(getattr(real, name).__members__), name
    assert _public(fake_tensorrt.ILogger) <= _public(real.ILogger)
    assert "SM89" in real.ComputeCapability.__members__


def test_the_real_package_takes_our_logger() -> None:
    """What of the real package runs without a driver: the logger, as a subclass of its own."""
    try:
        toolkit = load_toolkit("tensorrt-rtx")
    except D3tomError as error:
        pytest.skip(str(error))
    log = TensorRTLog(toolkit.trt)
    log.logger.log(toolkit.trt.ILogger.WARNING, "not kept")
    log.logger.log(toolkit.trt.ILogger.ERROR, " kept ")
    assert log.said() == "kept"
    assert log.said() == "it gave no reason"


class ScriptedCudart:
    """``cuda.bindings.runtime`` with its own names, enums and numbers of arguments, but made-up answers."""

    def __init__(self, **answers: Any) -> None:
        self._real = pytest.importorskip("cuda.bindings.runtime")
        self._answers, self.calls = answers, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        signature = re.match(rf"{name}\((.*)\)", getattr(real, "__doc__", None) or "")
        if signature is None or name in ("cudaGetErrorName", "cudaGetErrorString"):
            return real
        arity = len(signature[1].split(",")) if signature[1] else 0

        def call(*arguments: Any) -> tuple[Any, ...]:
            assert len(arguments) == arity, f"{name} takes {arity} arguments: {signature[0]}"
            self.calls.append((name, *arguments))
            answer = self._answers.get(name, ())
            if isinstance(answer, self._real.cudaError_t):
                return (answer, *[None] * 1)
            answer = answer(*arguments) if callable(answer) else answer
            return (self._real.cudaError_t.cudaSuccess, *(answer if isinstance(answer, tuple) else (answer,)))

        return call


def _scripted(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> ScriptedCudart:
    usual = {"cudaGetDeviceCount": 1, "cudaDriverGetVersion": 13000, "cudaStreamCreateWithFlags": 77}
    script = ScriptedCudart(**usual | answers)
    monkeypatch.setattr(cuda, "_runtime", lambda: script)
    return script


def test_cuda_is_called_by_its_names_and_numbers_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = np.zeros(16, dtype=np.uint8)
    script = _scripted(
        monkeypatch,
        cudaMalloc=4096,
        cudaHostAlloc=pool.ctypes.data,
        cudaStreamEndCapture="recording",
        cudaGraphInstantiate="graph",
    )
    device: Device = CudaDevice(Gpu(1, "Fake", 89))
    assert (device.stream, device.sm) == (77, 89)
    assert device.malloc(100) == 4096
    assert device.pin(16) == pool.ctypes.data
    device.to_device(4096, pool.ctypes.data, 16)
    device.to_host(pool.ctypes.data, 4096, 16)
    device.begin_capture()
    graph = device.end_capture()
    device.launch(graph)
    device.synchronize()
    device.drop_graph(graph)
    device.free(4096)
    device.unpin(pool.ctypes.data)
    device.close()
    kind, mode = script.cudaMemcpyKind, script.cudaStreamCaptureMode
    assert script.calls == [
        ("cudaSetDevice", 1),
        ("cudaStreamCreateWithFlags", script.cudaStreamNonBlocking),
        ("cudaMalloc", 100),
        ("cudaHostAlloc", 16, script.cudaHostAllocDefault),
        ("cudaMemcpyAsync", 4096, pool.ctypes.data, 16, kind.cudaMemcpyHostToDevice, 77),
        ("cudaMemcpyAsync", pool.ctypes.data, 4096, 16, kind.cudaMemcpyDeviceToHost, 77),
        ("cudaStreamBeginCapture", 77, mode.cudaStreamCaptureModeThreadLocal),
        ("cudaStreamEndCapture", 77),
        ("cudaGraphInstantiate", "recording", 0),
        ("cudaGraphDestroy", "recording"),
        ("cudaGraphLaunch", "graph", 77),
        ("cudaStreamSynchronize", 77),
        ("cudaGraphExecDestroy", "graph"),
        ("cudaFree", 4096),
        ("cudaFreeHost", pool.ctypes.data),
        ("cudaStreamDestroy", 77),
    ]


def test_gpus_are_told_by_name_and_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def attribute(which: Any, index: int) -> int:
        return {"cudaDevAttrComputeCapabilityMajor": (8, 12), "cudaDevAttrComputeCapabilityMinor": (9, 0)}[which.name][
            index
        ]

    names = [b"NVIDIA L4", b"NVIDIA GeForce RTX 5090"]
    _scripted(
        monkeypatch,
        cudaGetDeviceCount=2,
        cudaDeviceGetAttribute=attribute,
        cudaGetDeviceProperties=lambda index: SimpleNamespace(name=names[index] + b"\0\0"),
    )
    assert [str(gpu) for gpu in cuda.gpus()] == ["NVIDIA L4 (SM89)", "NVIDIA GeForce RTX 5090 (SM120)"]


def test_no_driver_no_gpu_and_no_memory_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    error = pytest.importorskip("cuda.bindings.runtime").cudaError_t
    _scripted(monkeypatch, cudaDriverGetVersion=0)
    with pytest.raises(D3tomError, match=r"no NVIDIA driver here.*--backend onnxruntime"):
        cuda.gpus()
    _scripted(monkeypatch, cudaGetDeviceCount=0)
    with pytest.raises(D3tomError, match=r"no GPU here"):
        cuda.gpus()
    _scripted(monkeypatch, cudaGetDeviceCount=error.cudaErrorInsufficientDriver)
    with pytest.raises(D3tomError, match=r"driver version is insufficient.*install the GPU's driver"):
        cuda.gpus()
    _scripted(monkeypatch, cudaMalloc=error.cudaErrorMemoryAllocation)
    with pytest.raises(D3tomError, match=r"allocate 3 MiB on Fake RTX 4090: out of memory .*lower precision"):
        CudaDevice(ADA).malloc(3 << 20)


# The strictness of the doubles


def test_memory_is_poisoned_deferred_and_checked() -> None:
    device = FakeDevice(ADA)
    there, here = device.malloc(300), device.pin(300)
    assert there >= DEVICE_BASE
    assert there % 256 == 0
    mine = device.pinned.view(here, 300)
    mine[:] = 1
    device.to_device(there, here, 300)
    mine[:] = 2  # too early: the copy has not run
    assert device.device.view(there, 300)[0] == POISON
    device.to_host(here, there, 300)
    assert mine[0] == POISON  # nothing may be read before the stream was waited for
    device.synchronize()
    assert set(mine.tolist()) == {POISON}  # what was there when the copy ran
    for bad in (
        lambda: device.to_device(there, here, 301),
        lambda: device.to_device(there + 1, here, 300),
        lambda: device.to_host(there, here, 4),
        lambda: device.free(there + 1),
    ):
        with pytest.raises(Misuse):
            bad()
    device.to_device(there, here, 4)
    with pytest.raises(Misuse, match="while work is pending"):
        device.free(there)
    device.synchronize()
    device.free(there)
    with pytest.raises(Misuse, match="not within live device memory"):
        device.to_device(there, here, 4)


def test_graphs_replay_addresses_and_nothing_may_be_allocated_in_a_capture() -> None:
    device = FakeDevice(ADA)
    there, here = device.malloc(8), device.pin(8)
    device.begin_capture()
    device.to_device(there, here, 8)
    for forbidden in (lambda: device.malloc(1), device.synchronize, device.begin_capture):
        with pytest.raises(Misuse, match="capture"):
            forbidden()
    graph = device.end_capture()
    assert device.copies == []
    device.launch(graph)
    device.synchronize()
    assert device.copies == [("up", 8)]
    device.free(there)
    device.launch(graph)
    with pytest.raises(Misuse, match="not within live device memory"):
        device.synchronize()
    device.drop_graph(graph)
    with pytest.raises(Misuse, match="was dropped"):
        device.launch(graph)


def _engine(engines: Bundle, stage: str, device: FakeDevice) -> FakeEngine:
    """An engine by itself, on a device that no backend will want back empty."""
    module = FakeTensorRT(device)
    plan = plan_file(engines.folder / FP32.folder, stage).read_bytes()
    engine = FakeRuntime(module, TensorRTLog(module).logger).deserialize_cuda_engine(plan)
    assert engine is not None
    return engine


USER_MANAGED = fake_tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED


@pytest.fixture
def context(engines: Bundle) -> tuple[FakeContext, FakeDevice]:
    """A context of `embed` with everything set for two tokens, and its device."""
    device = FakeDevice(ADA)
    made = _engine(engines, "embed", device).create_execution_context(USER_MANAGED)
    made.set_device_memory(device.malloc(8192), 8192)
    assert made.set_input_shape("token_ids", (1, 2))
    ids, pinned = device.malloc(16), device.pin(16)
    device.pinned.view(pinned, 16)[:] = 0
    device.to_device(ids, pinned, 16)
    device.synchronize()
    made.set_tensor_address("token_ids", ids)
    made.set_tensor_address("embeddings", device.malloc(2 * 32 * 4))
    return made, device


Broken = Callable[[FakeContext, FakeDevice], object]


@pytest.mark.parametrize(
    "broken",
    [
        lambda context, device: context._addresses.pop("embeddings"),
        lambda context, device: context._shapes.pop("token_ids"),
        lambda context, device: setattr(context, "_memory", None),
    ],
)
def test_a_context_refuses_to_run_half_told(context: tuple[FakeContext, FakeDevice], broken: Broken) -> None:
    broken(*context)
    assert not context[0].execute_async_v3(FakeDevice.stream)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda context, device: context.set_tensor_address("embeddings", device.malloc(255)), "not within live"),
        (lambda context, device: context.set_tensor_address("embeddings", device.malloc(999) + 8), "not aligned"),
        (
            lambda context, device: context.set_tensor_address("token_ids", device.pin(16)),
            "not within live|not aligned",
        ),
        (lambda context, device: context.set_tensor_address("embeddings", context._memory[0]), "in the activations"),
        (lambda context, device: context.set_device_memory(device.malloc(64), 64), "too small"),
    ],
)
def test_a_context_refuses_wrong_memory(context: tuple[FakeContext, FakeDevice], broken: Broken, says: str) -> None:
    def run() -> None:
        broken(*context)
        context[0].execute_async_v3(FakeDevice.stream)

    with pytest.raises(Misuse, match=says):
        run()


def test_a_context_refuses_what_tensorrt_refuses(context: tuple[FakeContext, FakeDevice]) -> None:
    made, _ = context
    assert not made.set_input_shape("token_ids", (1, 9999))
    assert not made.set_input_shape("embeddings", (1, 2, 32))
    assert not made.set_tensor_address("nothing", 256)
    assert made.infer_shapes() == []
    assert made.get_tensor_shape("embeddings") == (1, 2, 32)
    with pytest.raises(Misuse, match="not the device's stream"):
        made.execute_async_v3(0)


def test_captures_want_a_warm_context_that_stays_as_it_is(context: tuple[FakeContext, FakeDevice]) -> None:
    made, device = context
    device.begin_capture()
    with pytest.raises(Misuse, match="before a plain run"):
        made.execute_async_v3(device.stream)
    device.end_capture()
    assert made.execute_async_v3(device.stream)
    device.begin_capture()
    assert made.execute_async_v3(device.stream)
    graph = device.end_capture()
    device.launch(graph)
    device.synchronize()
    made.set_input_shape("token_ids", (1, 1))
    with pytest.raises(Misuse, match="context of a captured graph was changed"):
        device.launch(graph)


def test_shape_tensors_are_read_on_the_host_and_must_not_change(engines: Bundle) -> None:
    device, answer_length = FakeDevice(ADA), np.array([4])
    made = _engine(engines, "back", device).create_execution_context(USER_MANAGED)
    made.set_device_memory(device.malloc(8192), 8192)
    assert made.set_input_shape("merged", (1, 20, 32))
    assert made.infer_shapes() == ["answer_length"]
    made.set_tensor_address("answer_length", DEVICE_BASE)
    with pytest.raises(Misuse, match="no host memory"):
        made.infer_shapes()
    made.set_tensor_address("answer_length", answer_length.ctypes.data)
    assert made.infer_shapes() == []
    assert made.get_tensor_shape("token") == (1, 4)
    for name in ("merged", "token", "confidence", "doubt", "logits"):
        made.set_tensor_address(name, device.malloc(20 * 32 * 4 * 8))
    assert made.execute_async_v3(device.stream)
    answer_length[0] = 3
    with pytest.raises(Misuse, match="answer_length changed on the host"):
        device.synchronize()
    answer_length[0] = 99
    with pytest.raises(RuntimeError, match="outside the profile"):
        made.execute_async_v3(device.stream)


def test_a_context_with_memory_of_its_own_is_refused(engines: Bundle) -> None:
    engine = _engine(engines, "embed", FakeDevice(ADA))
    with pytest.raises(Misuse, match="memory of its own"):
        engine.create_execution_context(fake_tensorrt.ExecutionContextAllocationStrategy.STATIC)


def test_bfloat16_is_rounded_to_nearest_even_and_read_back() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values, np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 1.00390625, 1.01171875])])
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    found = from_engine(to_engine(values, "bfloat16"), "bfloat16")
    assert np.array_equal(expected, found, equal_nan=True)
    assert to_engine(np.array([1.5]), "float16").dtype == np.float16
