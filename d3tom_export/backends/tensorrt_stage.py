"""One stage's engine: what it is bound to, its execution contexts, and one launch of it.

A launch is data: which stage, which shapes, which addresses. Whoever has the same launch again has the same work on the
same memory, which is what lets CUDA graphs be found by what they do (:mod:`d3tom_export.backends.tensorrt_runner`).
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3tom_export.backends.rtx_runtime import RtxRuntime
from d3tom_export.backends.tensorrt_dtypes import TENSORRT_NAMES
from d3tom_export.engines.cuda import Device
from d3tom_export.engines.log import TensorRTLog
from d3tom_export.engines.record import EngineRecord
from d3tom_export.engines.shapes import SHAPE_INPUTS, check_fits
from d3tom_export.engines.stages import ITEM_BYTES
from d3tom_export.engines.toolkit import Toolkit
from d3tom_export.errors import D3tomError, listing
from d3tom_export.stages.contract import TensorSpec

_BUILD_OPTIONS = (({"B"}, "--batch"), ({"V", "K"}, "--visual-tokens"), ({"G"}, "--answer-tokens"))
"""What widens an axis. The others are sums that the text's length is part of."""

_INT64 = 8
"""Bytes."""

Axes = Mapping[str, int]
"""Sizes of dynamic axes (stages/contract.py) by name."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One run of a stage's engine: equal launches do the same work on the same memory."""

    stage: str
    profile: int
    """Which of the engine's optimization profiles."""
    shapes: tuple[tuple[str, Shape], ...]
    """Of the device tensors, inputs first."""
    addresses: tuple[tuple[str, int], ...]
    values: tuple[tuple[str, int], ...]
    """Of the shape inputs."""


def tensor_shape(tensor: TensorSpec, axes: Axes) -> Shape:
    """Raises :class:`KeyError` for an axis that ``axes`` does not know."""
    return tuple(axes[axis] if isinstance(axis, str) else axis for axis in tensor.axes)


def deserialize(toolkit: Toolkit, runtime: Any, path: Path, log: TensorRTLog) -> Any:
    """The engine in ``path``, a plan that was checked; its file is mapped, not read into memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        said = log.said()
        if "memory" in said.lower():
            raise D3tomError(
                f"{toolkit.name} {toolkit.version} cannot load engine {path}: {said}. The GPU has too little memory "
                "left for it: close other programs there (`nvidia-smi` lists them), or use engines of lower precision."
            )
        raise D3tomError(
            f"{toolkit.name} {toolkit.version} cannot load engine {path}: {said}. Build it again on this machine "
            "with `d3tom-export build --bundle`, or run with --backend onnxruntime."
        )
    return engine


class Stage:
    """A deserialized engine and its record.

    Args:
        record: What the engine was built as; the engine is checked against it.
        engine: TensorRT's engine.
        toolkit: The TensorRT it comes from.
        log: What that says.
        rtx: How TensorRT-RTX runs it; None: TensorRT does.
    """

    def __init__(
        self, record: EngineRecord, engine: Any, toolkit: Toolkit, log: TensorRTLog, rtx: RtxRuntime | None = None
    ) -> None:
        self.name, self.record = record.stage, record
        self.inputs, self.outputs = record.inputs, record.outputs
        self.engine, self.toolkit, self.log = engine, toolkit, log
        self._rtx = rtx
        self.device_tensors = tuple(t for t in (*self.inputs, *self.outputs) if t.name not in SHAPE_INPUTS)
        self.shape_inputs = tuple(tensor.name for tensor in self.inputs if tensor.name in SHAPE_INPUTS)
        self._check_engine()

    @property
    def activation_bytes(self) -> int:
        """Device memory a context needs while it runs, for the largest shapes."""
        return int(self.engine.device_memory_size_v2)

    def _check_engine(self) -> None:
        """Make sure that the engine has the tensors its record says, where they are expected: a wrong one would be
        read or written beyond its end."""
        trt, engine = self.toolkit.trt, self.engine
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        expected = {tensor.name for tensor in (*self.inputs, *self.outputs)}
        problems = [f"{name} is missing" for name in sorted(expected - names)]
        problems += [f"{name} is not in its record" for name in sorted(names - expected)]
        for tensor in (*self.inputs, *self.outputs):
            if tensor.name not in names:
                continue
            dtype = engine.get_tensor_dtype(tensor.name)
            if dtype != getattr(trt.DataType, TENSORRT_NAMES[tensor.dtype]):
                problems.append(f"{tensor.name} is {dtype}, expected {tensor.dtype}")
            host = tensor.name in SHAPE_INPUTS
            location = trt.TensorLocation.HOST if host else trt.TensorLocation.DEVICE
            if engine.get_tensor_location(tensor.name) != location:
                problems.append(f"{tensor.name} is not on the {'host' if host else 'device'}")
        if problems:
            raise D3tomError(
                f"The engine of stage {self.name} is not what its record says: {listing(problems)}. "
                "Build it again with `d3tom-export build --bundle`."
            )

    def misfits(self, axes: Axes, profile: int = 0) -> set[str]:
        """Names of the axes of ``axes`` whose size is outside ``profile``."""
        outside = set()
        for tensor in self.inputs:
            low, _, high = self.record.profiles[profile][tensor.name]
            names = (SHAPE_INPUTS[tensor.name],) if tensor.name in SHAPE_INPUTS else tensor.axes
            for name, smallest, largest in zip(names, low, high, strict=True):
                if isinstance(name, str) and name in axes and not smallest <= axes[name] <= largest:
                    outside.add(name)
        return outside

    def check_fits(self, axes: Axes, remedy: str, profile: int = 0) -> None:
        """Refuse sizes that ``profile`` does not cover, as far as ``axes`` knows them."""
        given: dict[str, Shape] = {}
        for tensor in self.inputs:
            with suppress(KeyError):
                value = tensor.name in SHAPE_INPUTS
                given[tensor.name] = (axes[SHAPE_INPUTS[tensor.name]],) if value else tensor_shape(tensor, axes)
        check_fits(self.name, self.record.profiles[profile], given, remedy)

    def launch(self, axes: Axes, place: Callable[[str, int], int], profile: int = 0) -> Launch:
        """The launch for ``axes`` in ``profile``; ``place`` gives each device tensor's address from its name and size
        in bytes."""
        shapes = tuple((tensor.name, tensor_shape(tensor, axes)) for tensor in self.device_tensors)
        return Launch(
            self.name,
            profile,
            shapes,
            tuple(
                (tensor.name, place(tensor.name, math.prod(shape) * ITEM_BYTES[tensor.dtype]))
                for tensor, (_, shape) in zip(self.device_tensors, shapes, strict=True)
            ),
            tuple((name, axes[SHAPE_INPUTS[name]]) for name in self.shape_inputs),
        )

    def new_context(self, activation: tuple[int, int], device: Device, profile: int = 0) -> StageContext:
        """An execution context in ``profile``; it works in ``activation``, address and bytes, which all contexts share.

        TensorRT-RTX compiles kernels for a shape while it already answers with general ones, so only itself knows when
        a capture pays: it is left to do so (rtx_runtime.py). TensorRT does nothing by itself; its contexts are captured
        by the runner.
        """
        managed = self.toolkit.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        how = managed if self._rtx is None else self._rtx.config(self.engine)
        context = self.engine.create_execution_context(how)
        if context is None:
            raise D3tomError(
                f"{self.toolkit.name} {self.toolkit.version} cannot make a context for stage {self.name}: "
                f"{self.log.said()}. Free memory on the GPU (`nvidia-smi` lists its users) or run --no-cuda-graphs."
            )
        context.set_device_memory(*activation)
        # An engine's first context has profile 0 from the start; of later ones not every version says so.
        chosen = context.active_optimization_profile == profile
        if not chosen and not context.set_optimization_profile_async(profile, device.stream):
            raise D3tomError(
                f"{self.toolkit.name} {self.toolkit.version} does not set the profile of stage {self.name}: "
                f"{self.log.said()}. Run with --no-cuda-graphs, which needs one context a stage."
            )
        return StageContext(self, context, device, profile)


def out_of_profile_remedy(outside: set[str]) -> str:
    """Which options of `build` widen the axes that were ``outside``."""
    if "views" in outside:
        return "The model's picture grid needs more views than that; build its engines again."
    options = [option for axes, option in _BUILD_OPTIONS if outside & axes]
    if set(options) <= {"--batch"} and outside - {"B"}:
        options.append("--text-tokens")
    return (
        f"Build engines for it with a wider {' and '.join(options)} (min:opt:max) of `d3tom-export build --bundle`, or "
        "run with --backend onnxruntime."
    )


class StageContext:
    """An execution context, and what it is bound to: only what changed is told to TensorRT."""

    def __init__(self, stage: Stage, context: Any, device: Device, profile: int) -> None:
        self._stage, self._context, self._device = stage, context, device
        # TensorRT reads shape inputs on the host, as late as at the launch: each context has numbers of its own. Plans
        # also copy them to the device, which may be captured: they are page-locked.
        self._pinned = device.pin(_INT64 * len(stage.shape_inputs)) if stage.shape_inputs else None
        self._values = {
            name: ctypes.c_int64.from_address(self._pinned + _INT64 * index)
            for index, name in enumerate(stage.shape_inputs)
            if self._pinned is not None
        }
        self._bound = self._unbound = Launch(stage.name, profile, (), (), ())
        self._input_names = {tensor.name for tensor in stage.inputs}

    def enqueue(self, launch: Launch, stream: int) -> None:
        """Enqueue ``launch`` on ``stream``."""
        if launch != self._bound:
            self._bind(launch)
        if not self._context.execute_async_v3(stream):
            raise self._refused("run")

    def close(self) -> None:
        """Give the context up; nothing of it may be pending."""
        del self._context
        if self._pinned is not None:
            self._device.unpin(self._pinned)

    def _bind(self, launch: Launch) -> None:
        bound, self._bound = self._bound, self._unbound
        shapes, addresses = dict(bound.shapes), dict(bound.addresses)
        for name, shape in launch.shapes:
            if name in self._input_names and shapes.get(name) != shape:
                self._expect(self._context.set_input_shape(name, shape), f"take {name} of shape {shape}")
        if launch.values != bound.values:
            for name, value in launch.values:
                self._values[name].value = value
                # Set again though the address is the same: shapes are inferred anew from what lies there.
                address = ctypes.addressof(self._values[name])
                self._expect(self._context.set_tensor_address(name, address), f"take {name} = {value}")
        for name, address in launch.addresses:
            if addresses.get(name) != address:
                self._expect(self._context.set_tensor_address(name, address), f"take {name}")
        if (launch.shapes, launch.values) != (bound.shapes, bound.values):
            self._check_shapes(launch)
        self._bound = launch

    def _check_shapes(self, launch: Launch) -> None:
        """Let TensorRT infer the outputs' shapes and compare them with those the buffers were made for."""
        if missing := self._context.infer_shapes():
            raise self._refused(f"infer shapes without {listing(missing)}")
        for name, shape in launch.shapes:
            found = tuple(self._context.get_tensor_shape(name))
            if found != shape:
                raise self._refused(f"give {name} of shape {shape}, but would give {found}")

    def _expect(self, done: bool, what: str) -> None:
        if not done:
            raise self._refused(what)

    def _refused(self, what: str) -> D3tomError:
        stage = self._stage
        return D3tomError(
            f"{stage.toolkit.name} {stage.toolkit.version} does not {what} in stage {stage.name}: {stage.log.said()}. "
            "Build the engines again with `d3tom-export build --bundle`, or run with --backend onnxruntime."
        )
