"""A double of TensorRT's runtime: engines that run a stage's ONNX graph with ONNX Runtime, on a :class:`FakeDevice`.

What it proves: that the backend sets what TensorRT must be told, before it must be told. Contexts refuse shapes outside
the profile, infer the outputs' shapes from the graph itself (a run on zeros), read shape tensors on the host at the
launch, want every address set, aligned and large enough, and want a shared activation block, which they fill with
garbage when they run. A captured launch keeps shapes, addresses and values as they were; changing its context
afterwards, or capturing before a plain run at that shape, is an error.

What it cannot prove: that TensorRT accepts, computes or captures the same; that a plugin runs; how fast anything is.
A "plan" is a small JSON file; precisions are played by rounding what goes in and out of a stage.
"""

from __future__ import annotations

import enum
import json
import math
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from d3tom_export.backends.tensorrt_dtypes import from_engine, host_dtype, to_engine
from d3tom_export.engines.stages import ITEM_BYTES
from tests.backends.fake_cuda import POISON, FakeDevice, demand, host_int64

ACTIVATION_BYTES = 4096


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1


class ILogger:
    ERROR, INTERNAL_ERROR = Severity.ERROR, Severity.INTERNAL_ERROR


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT64, INT32, BOOL = range(6)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


DTYPES = {
    "float32": DataType.FLOAT, "float16": DataType.HALF, "bfloat16": DataType.BF16,
    "int64": DataType.INT64, "int32": DataType.INT32, "bool": DataType.BOOL,
}  # fmt: skip
_GRAPH_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(bool)": "bool",
}  # fmt: skip


@cache
def _session(graph: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@cache
def _graph_dtypes(graph: str) -> dict[str, str]:
    """The dtypes of a graph's inputs, which may be float32 where the engine's are lower: the double then rounds."""
    session = _session(graph)
    inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
    return {tensor.name: _GRAPH_DTYPES[tensor.type] for tensor in inputs if tensor.type in _GRAPH_DTYPES}


Input = tuple[str, tuple[int, ...], int | None]
"""An input's name and shape, and a shape tensor's value."""


@lru_cache(maxsize=4096)
def _output_shapes(graph: str, inputs: tuple[Input, ...]) -> dict[str, Any]:
    """Shapes of a graph's outputs, by running it on zeros.

    Positions count up instead: no two visual tokens are in one place.
    """
    dtypes = _graph_dtypes(graph)
    arrays = {name: np.full(shape, value or 0, dtype=dtypes[name]) for name, shape, value in inputs}
    if "visual_positions" in arrays:
        arrays["visual_positions"] = np.arange(len(arrays["visual_positions"]))
    session = _session(graph)
    names = [output.name for output in session.get_outputs()]
    return {name: array.shape for name, array in zip(names, session.run(names, arrays), strict=True)}


class FakeRuntime:
    """``trt.Runtime``. Also counts what was deserialized, which a refusal must come before."""

    def __init__(self, module: FakeTensorRT, logger: Any) -> None:
        assert isinstance(logger, ILogger)
        self._module, self._logger = module, logger

    def deserialize_cuda_engine(self, plan: Any) -> FakeEngine | None:
        self._module.deserialized += 1
        try:
            return FakeEngine(self._module, json.loads(bytes(plan)), self._logger)
        except ValueError:
            self._logger.log(Severity.ERROR, "magic tag does not match")
            return None


class FakeEngine:
    """``trt.ICudaEngine``."""

    def __init__(self, module: FakeTensorRT, plan: dict[str, Any], logger: Any) -> None:
        self._module, self._plan, self._logger = module, plan, logger
        self._inputs: dict[str, str] = plan["inputs"]
        self._outputs: dict[str, str] = plan["outputs"]
        self._dtypes = self._inputs | self._outputs
        self.num_io_tensors = len(self._dtypes)
        self._contexts = 0
        self.device_memory_size_v2 = plan["activation"]

    def get_tensor_name(self, index: int) -> str:
        return list(self._dtypes)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DTYPES[self._dtypes[name]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self._plan["shape_inputs"] else TensorLocation.DEVICE

    def create_runtime_config(self) -> FakeRuntimeConfig:
        demand(self._module.rtx, "create_runtime_config is TensorRT-RTX's")
        return FakeRuntimeConfig(self._module)

    def create_execution_context(self, how: Any) -> FakeContext:
        strategy = how._strategy if isinstance(how, FakeRuntimeConfig) else how
        demand(strategy is ExecutionContextAllocationStrategy.USER_MANAGED, "a context with memory of its own")
        if isinstance(how, FakeRuntimeConfig):
            self._module.strategies.add(how.cuda_graph_strategy)
            self._module.specializations.add(how.dynamic_shapes_kernel_specialization_strategy)
        context = FakeContext(self, how._cache if isinstance(how, FakeRuntimeConfig) else None)
        self._contexts += 1
        self._module.contexts += 1
        self._module.alive.add(context)
        return context


class FakeRuntimeConfig:
    """``trt.IRuntimeConfig``."""

    def __init__(self, module: FakeTensorRT) -> None:
        self._module = module
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._cache: FakeRuntimeCache | None = None
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache(self._module)

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        demand(isinstance(cache, FakeRuntimeCache), "no runtime cache")
        self._cache = cache
        return True


class FakeRuntimeCache:
    """``trt.IRuntimeCache``: remembers which stage was compiled for which shapes, on which GPU."""

    def __init__(self, module: FakeTensorRT) -> None:
        self._module = module
        self._kernels: set[str] = set()

    def serialize(self) -> NDArray[np.uint8]:
        """As ``trt.IHostMemory``: a buffer that knows its ``nbytes``."""
        content = json.dumps({"gpu": self._module.device.name, "kernels": sorted(self._kernels)})
        return np.frombuffer(content.encode(), dtype=np.uint8)

    def deserialize(self, blob: Any) -> bool:
        demand(not self._module.device.closed, "a cache read without a CUDA context")
        try:
            raw = json.loads(bytes(blob))
        except ValueError:
            return False
        if raw["gpu"] != self._module.device.name:
            return False
        self._kernels = set(raw["kernels"])
        return True


class FakeContext:
    """``trt.IExecutionContext``."""

    def __init__(self, engine: FakeEngine, cache: FakeRuntimeCache | None = None) -> None:
        self._engine, self._device = engine, engine._module.device
        self._cache = cache
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._inferred: tuple[Any, dict[str, tuple[int, ...]]] | None = None
        # Only an engine's first context has its profile from the start, as some versions have it.
        self.active_optimization_profile = -1 if engine._contexts else 0
        self._version, self._warm = 0, -1

    @property
    def _profile(self) -> dict[str, Any]:
        profile: dict[str, Any] = self._engine._plan["profiles"][self.active_optimization_profile]
        return profile

    def _refuse(self, message: str) -> bool:
        self._engine._logger.log(Severity.ERROR, message)
        return False

    def set_device_memory(self, memory: int, size: int) -> None:
        demand(memory % 256 == 0, "activations are not aligned to 256 bytes")
        demand(size >= self._engine.device_memory_size_v2, "the activation block is too small")
        self._version += 1
        self._memory = memory, size
        self._engine._module.activations.add((memory, size))

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        demand(stream_handle == self._device.stream, "not the device's stream")
        demand(not self._device.capturing, "a profile set during a capture")
        self._version += 1
        self.active_optimization_profile = profile_index
        return profile_index < len(self._engine._plan["profiles"]) or self._refuse(f"no profile {profile_index}")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self._engine._inputs:
            return self._refuse(f"{name} is not an input")
        if self.active_optimization_profile < 0:
            return self._refuse("no profile is set")
        smallest, _, largest = self._profile[name]
        fits = len(shape) == len(smallest)
        if not fits or not all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)):
            return self._refuse(f"{name} of shape {shape} is outside the profile")
        self._version += 1
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._dtypes:
            return self._refuse(f"{name} is not a tensor")
        self._version += 1
        self._addresses[name] = memory
        return True

    def _specified(self) -> tuple[list[str], tuple[Input, ...]]:
        """Inputs that are not specified, and the others as :func:`_output_shapes` takes them."""
        missing: list[str] = []
        inputs: list[Input] = []
        for name in self._engine._inputs:
            if name in self._engine._plan["shape_inputs"]:
                if name not in self._addresses:
                    missing.append(name)
                    continue
                value = host_int64(self._addresses[name])
                (smallest,), _, (largest,) = self._profile[name]
                if not smallest <= value <= largest:
                    raise RuntimeError(f"{name} = {value} is outside the profile")
                inputs.append((name, (1,), value))
            elif name not in self._shapes:
                missing.append(name)
            else:
                inputs.append((name, self._shapes[name], None))
        return missing, tuple(inputs)

    def infer_shapes(self) -> list[str]:
        missing, inputs = self._specified()
        if not missing:
            self._inferred = inputs, _output_shapes(self._engine._plan["graph"], inputs)
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        return (-1,) if self._inferred is None else self._inferred[1][name]

    def execute_async_v3(self, stream_handle: int) -> bool:
        demand(stream_handle == self._device.stream, "not the device's stream")
        missing, inputs = self._specified()
        if missing or self._memory is None:
            return self._refuse(f"not specified: {missing or 'device memory'}")
        if self._inferred is None or self._inferred[0] != inputs:
            self._inferred = inputs, _output_shapes(self._engine._plan["graph"], inputs)
        shapes = {name: shape for name, shape, _ in inputs} | self._inferred[1]
        placed = set(self._engine._dtypes) - set(self._engine._plan["shape_inputs"])
        if unset := placed - self._addresses.keys():
            return self._refuse(f"no address for {sorted(unset)}")
        work = _Work(self, {name: (self._addresses[name], shapes[name]) for name in placed}, inputs, self._memory)
        if self._device.capturing:
            demand(self._warm == self._version, "captured before a plain run at this shape and these addresses")
        else:
            self._warm = self._version
        if self._cache is not None:
            kernels = f"{self._engine._plan['stage']} {inputs}"
            self._engine._module.compiled += kernels not in self._cache._kernels
            self._cache._kernels.add(kernels)
        self._device.log.append(self._engine._plan["stage"])
        self._device.enqueue(work)
        return True


class _Work:
    """One launch, with all that it had been told when it was enqueued or captured."""

    def __init__(
        self,
        context: FakeContext,
        tensors: dict[str, tuple[int, tuple[int, ...]]],
        inputs: tuple[Input, ...],
        memory: tuple[int, int],
    ) -> None:
        self._context, self._tensors, self._inputs, self._memory = context, tensors, inputs, memory
        self._engine, self._device = context._engine, context._device
        self._version = context._version
        self._values = dict(context._addresses)
        for name in tensors:
            self._view(name)

    def check(self) -> None:
        """At a graph's launch."""
        demand(self._context._version == self._version, "the context of a captured graph was changed")

    def _view(self, name: str) -> NDArray:
        address, shape = self._tensors[name]
        demand(address % 256 == 0, f"{name} is not aligned to 256 bytes")
        dtype = self._engine._dtypes[name]
        start, size = self._memory
        demand(not start <= address < start + size, f"{name} lies in the activations")
        data = self._device.device.view(address, math.prod(shape) * ITEM_BYTES[dtype])
        return data.view(host_dtype(dtype)).reshape(shape)

    def __call__(self) -> None:
        feeds: dict[str, NDArray] = {}
        dtypes = _graph_dtypes(self._engine._plan["graph"])
        for name, _, value in self._inputs:
            if value is None:
                feeds[name] = from_engine(self._view(name), self._engine._dtypes[name]).astype(dtypes[name])
            else:
                demand(host_int64(self._values[name]) == value, f"{name} changed on the host before the launch ran")
                feeds[name] = np.array([value], dtype=np.int64)
        session = _session(self._engine._plan["graph"])
        names = list(self._engine._outputs)
        self._device.device.view(*self._memory)[:] = POISON ^ 0xFF
        for name, array in zip(names, session.run(names, feeds), strict=True):
            self._view(name)[...] = to_engine(array, self._engine._dtypes[name])


class FakeTensorRT(SimpleNamespace):
    """The module ``tensorrt``, or with ``rtx`` ``tensorrt_rtx``, over ``device``."""

    def __init__(self, device: FakeDevice, *, rtx: bool = False) -> None:
        names = {"ComputeCapability": SimpleNamespace(__members__={"CURRENT": 0, "SM89": 1, "SM120": 2})} if rtx else {}
        super().__init__(
            __name__="tensorrt_rtx" if rtx else "tensorrt",
            ILogger=ILogger,
            DataType=DataType,
            TensorLocation=TensorLocation,
            ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
            CudaGraphStrategy=CudaGraphStrategy,
            DynamicShapesKernelSpecializationStrategy=DynamicShapesKernelSpecializationStrategy,
            **names,
        )
        self.device, self.rtx = device, rtx
        self.deserialized = self.contexts = self.compiled = 0
        self.strategies: set[CudaGraphStrategy] = set()
        self.specializations: set[DynamicShapesKernelSpecializationStrategy] = set()
        self.activations: set[tuple[int, int]] = set()
        self.alive: WeakSet[FakeContext] = WeakSet()

    __hash__ = object.__hash__  # as a module's

    def Runtime(self, logger: Any) -> FakeRuntime:  # noqa: N802
        return FakeRuntime(self, logger)


def fake_plan(graph: Path, stage: str, inputs: dict[str, str], outputs: dict[str, str], **more: Any) -> bytes:
    """What stands in for a plan: the graph to run, and what an engine knows of its tensors."""
    plan = {"graph": str(graph), "stage": stage, "inputs": inputs, "outputs": outputs, "activation": ACTIVATION_BYTES}
    return json.dumps(plan | more).encode()
