"""One engine from one graph file: parse, profile, build, look at what was built. TensorRT and TensorRT-RTX alike."""

from __future__ import annotations

import json
import mmap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3tom_export.engines.cuda import gpus, use_gpu
from d3tom_export.engines.log import TensorRTLog, log_of
from d3tom_export.engines.record import MergeOp
from d3tom_export.engines.shapes import SHAPE_INPUTS, Profile
from d3tom_export.engines.toolkit import Toolkit
from d3tom_export.errors import D3tomError, listing
from d3tom_export.plugins.merge_op import OP_TYPE
from d3tom_export.trust.files import create_file

PhaseProgress = Callable[[str, int, int], None]
"""Called as (phase of the build, steps done, steps in all)."""


@dataclass(frozen=True)
class BuilderSettings:
    """What else decides a plan."""

    optimization_level: int | None = None
    """How long TensorRT searches for kernels, 0 to 5; None is its own choice."""
    workspace_mib: int | None = None
    """The most scratch memory that a kernel may take; None is all of the GPU's."""


@dataclass(frozen=True)
class Layer:
    """One layer of the network an engine was built from."""

    name: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """Tensors as ``name dtype[shape]``; -1 is an axis that varies."""


@dataclass(frozen=True)
class BuiltPlan:
    """What a written engine was made of."""

    layers: tuple[Layer, ...]
    """Of the network, as the parser made it."""
    engine_layers: Any
    """What TensorRT's inspector tells of the engine, fused as it runs; None where no GPU can open it."""
    plugin_layers: int
    timing_cache: bytes | None


def _monitor(trt: Any, progress: PhaseProgress, cancelled: threading.Event) -> Any:
    """The builder's phases as progress; a build stops at its next step after ``cancelled`` is set."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            return not cancelled.is_set()

    return Monitor()


def _interruptible(work: Callable[[], Any], cancelled: threading.Event) -> Any:
    """Run ``work`` in a thread of its own, so that Ctrl-C reaches this one; then cancel it and wait for its end."""
    # Thread.join takes a thread for ended when Ctrl-C reaches it while it waits (CPython before 3.13); so it is only
    # come to, as the executor is left, when the work is over. Further interrupts change nothing.
    with ThreadPoolExecutor(1, "engine build") as executor:
        interrupt: KeyboardInterrupt | None = None
        try:
            future = executor.submit(work)
        except KeyboardInterrupt:
            cancelled.set()  # it may have begun
            raise
        while not future.done():
            try:
                wait([future], timeout=0.2)
            except KeyboardInterrupt as pressed:
                cancelled.set()
                interrupt = interrupt or pressed
    if interrupt is not None:
        raise interrupt
    return future.result()


def _parse(toolkit: Toolkit, network: Any, log: TensorRTLog, graph: Path) -> None:
    parser = toolkit.trt.OnnxParser(network, log.logger)
    if parser.parse_from_file(str(graph)):
        return
    problems = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)]
    if any(OP_TYPE in problem or "Plugin not found" in problem for problem in problems):
        raise D3tomError(
            f"{toolkit.name} {toolkit.version} does not know the merge plugin that {graph.name} asks for "
            f"({listing(problems, 1)}). Register it first (d3tom_export.plugins.merge_plugin), or build with "
            "--merge-op onnx, which needs no plugin."
        )
    raise D3tomError(
        f"{toolkit.name} {toolkit.version} cannot read {graph}: {listing(problems, 3)}. Rebuild the bundle with this "
        "version of d3tom-export, or try another version of TensorRT."
    )


def check_target(toolkit: Toolkit, sms: Sequence[int]) -> None:
    """Refuse architectures that ``toolkit`` cannot build for: RTX has its list, TensorRT the one GPU it runs on."""
    known = toolkit.architectures
    if known is not None:
        if unknown := [sm for sm in sms if sm not in known]:
            raise D3tomError(
                f"{toolkit.name} {toolkit.version} builds no engines of merging stages for {_names(unknown)}; it "
                f"does for {_names(known)}. Other GPUs (Turing, Hopper, the data centre's Blackwell) are targets of "
                "--engine tensorrt, on such a GPU."
            )
        return
    here = gpus()
    if len(sms) != 1 or sms[0] not in {gpu.sm for gpu in here}:
        raise D3tomError(
            f"{toolkit.name} times its kernels on the GPU that it builds for: engines for {_names(sms)} cannot be "
            f"built here, where the GPU is {listing(here)}. Build on such a GPU, or with --engine tensorrt-rtx, which "
            "builds ahead of time."
        )


def _set_target(toolkit: Toolkit, config: Any, sms: Sequence[int]) -> None:
    if toolkit.ahead_of_time:
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(toolkit.trt.ComputeCapability.__members__[f"SM{sm}"], index)


def _add_profiles(builder: Any, config: Any, network: Any, profiles: Sequence[Profile]) -> None:
    expected = {network.get_input(index).name for index in range(network.num_inputs)}
    for index, profile in enumerate(profiles):
        if expected != set(profile):
            raise D3tomError(
                f"The network has inputs {listing(sorted(expected))}, the stage {listing(sorted(profile))}. "
                "This is a defect of d3tom-export; please report it."
            )
        shapes = builder.create_optimization_profile()
        for name, (smallest, common, largest) in profile.items():
            if name in SHAPE_INPUTS:
                shapes.set_shape_input(name, list(smallest), list(common), list(largest))
            else:
                shapes.set_shape(name, smallest, common, largest)
        if config.add_optimization_profile(shapes) != index:
            raise D3tomError(
                f"TensorRT does not take the sizes {profile} as an optimization profile. "
                "This is a defect of d3tom-export; please report it with the TensorRT version."
            )


def _tensor(tensor: Any) -> str:
    try:
        shape = list(tensor.shape)
    except ValueError:  # a rank that is not known yet
        shape = ["?"]
    return f"{tensor.name} {tensor.dtype.name.lower()}{shape}"


def network_layers(network: Any) -> tuple[Layer, ...]:
    """The layers that the parser made."""
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        layers.append(
            Layer(
                layer.name,
                layer.type.name,
                tuple(_tensor(tensor) for tensor in inputs if tensor is not None),
                tuple(_tensor(tensor) for tensor in outputs if tensor is not None),
            )
        )
    return tuple(layers)


def _check_merge_layers(graph: Path, plan: Path, layers: tuple[Layer, ...], expected: int, merge_op: MergeOp) -> int:
    """Make sure that the merge became what was asked for: ``expected`` plugin layers in the network, and the plugin's
    name in the plan exactly where it is to be looked up. A wrong name or version would have fallen back silently."""
    found = sum(layer.type.startswith("PLUGIN") for layer in layers)
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        named = content.find(OP_TYPE.encode()) >= 0
    if found != expected or (merge_op != "aot" and named != (expected > 0)):
        raise D3tomError(
            f"The engine of {graph.name} has {found} plugin layers and {'names' if named else 'does not name'} "
            f"{OP_TYPE}, expected {expected}. The builder took another implementation of the merge than was asked for; "
            "this is a defect, please report it with the TensorRT version."
        )
    return found


def inspect_plan(toolkit: Toolkit, plan: Path, sms: Sequence[int], log: TensorRTLog) -> Any:
    """The inspector's table of the layers in the file ``plan``, parsed; None where no GPU of ``sms`` is here to open
    it."""
    try:
        if not {gpu.sm for gpu in gpus()}.intersection(sms):
            return None
    except D3tomError:
        return None
    trt = toolkit.trt
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = trt.Runtime(log.logger).deserialize_cuda_engine(content)
    if engine is None:
        raise D3tomError(
            f"{toolkit.name} {toolkit.version} built an engine for {_names(sms)} that it cannot open on this GPU: "
            f"{log.said()}. Update the GPU's driver (`nvidia-smi` shows its version), or try another TensorRT."
        )
    return json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


class _PlanFile:
    """Writes a plan as the builder gives it, so that it never lies in memory whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.error: OSError | None = None
        """What kept it from being written."""

    def writer(self, trt: Any) -> Any:
        """What TensorRT writes to."""
        outer = self

        class Writer(trt.IStreamWriter):
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: Any) -> int:
                try:
                    outer.file.write(data)
                except OSError as error:  # TensorRT takes fewer bytes for a failure, and no exception
                    outer.error = error
                    return 0
                return len(data)

        return Writer()

    def __enter__(self) -> _PlanFile:
        self.file = create_file(self._path)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.file.close()
        if kind is not None:
            self._path.unlink()


def _build_here(toolkit: Toolkit, sms: Sequence[int]) -> Callable[[], None]:
    """What the building thread does first: make the GPU that is built for CUDA's current one.

    TensorRT times kernels on the thread's current GPU, which in a new thread is the first. Ahead of time none is used.
    """
    if toolkit.ahead_of_time:
        return lambda: None
    gpu = next(gpu for gpu in gpus() if gpu.sm in sms)
    return lambda: use_gpu(gpu)


def _names(sms: Sequence[int]) -> str:
    return listing(f"SM{sm}" for sm in sms)


def build_plan(
    toolkit: Toolkit,
    graph: Path,
    profiles: Sequence[Profile],
    sms: Sequence[int],
    plan: Path,
    *,
    merge_op: MergeOp,
    plugin_layers: int,
    settings: BuilderSettings,
    timing_cache: bytes = b"",
    progress: PhaseProgress = lambda what, done, total: None,
) -> BuiltPlan:
    """Build the engine of ``graph`` for compute capabilities ``sms`` and write it to ``plan``, where no file may be.

    Args:
        toolkit: Its merge plugin is registered where the graph asks for it.
        graph: An ONNX file as :mod:`d3tom_export.engines.graph` writes it; weights beside it.
        profiles: Shapes to serve.
        sms: Compute capabilities without their dot. TensorRT builds for one, that of a GPU which is here.
        plan: Written as the builder gives it; gone again where the build fails.
        merge_op: What the graph has in place of its merge nodes.
        plugin_layers: How many layers must turn out to be plugins.
        settings: Further settings.
        timing_cache: Kernel times of earlier builds for this architecture and version; empty for none.
        progress: Called as the builder goes through its phases.

    Raises :class:`D3tomError` where the graph cannot be parsed or built, :class:`OSError` where the plan cannot be
    written. Ctrl-C stops a build at its next step.
    """
    trt, log = toolkit.trt, log_of(toolkit.trt)
    log.forget()
    builder = trt.Builder(log.logger)
    if builder is None:
        raise D3tomError(f"{toolkit.name} {toolkit.version} cannot start: {log.said()}.")
    flags = trt.NetworkDefinitionCreationFlag.__members__
    network = builder.create_network(1 << int(flags["STRONGLY_TYPED"]) if "STRONGLY_TYPED" in flags else 0)
    _parse(toolkit, network, log, graph)
    config = builder.create_builder_config()
    check_target(toolkit, sms)
    _set_target(toolkit, config, sms)
    _add_profiles(builder, config, network, profiles)
    if "TF32" in trt.BuilderFlag.__members__:
        config.clear_flag(trt.BuilderFlag.TF32)  # ten bits of mantissa are not float32
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    cache = None
    if not toolkit.ahead_of_time:  # ahead of time nothing is measured
        cache = config.create_timing_cache(timing_cache)
        config.set_timing_cache(cache, ignore_mismatch=False)
    cancelled = threading.Event()
    config.progress_monitor = _monitor(trt, progress, cancelled)
    select_gpu = _build_here(toolkit, sms)
    with _PlanFile(plan) as file:
        streams = hasattr(builder, "build_serialized_network_to_stream")  # TensorRT 10.8, the oldest, may not
        writer = file.writer(trt) if streams else None

        def build() -> Any:
            select_gpu()
            if writer is not None:
                return builder.build_serialized_network_to_stream(network, config, writer)
            whole = builder.build_serialized_network(network, config)
            return whole is not None and file.file.write(memoryview(whole))

        built = _interruptible(build, cancelled)
        if file.error is not None:
            raise file.error
        if not built:
            raise D3tomError(
                f"{toolkit.name} {toolkit.version} cannot build {graph.name} for {_names(sms)}: {log.said()}. Try "
                "--merge-op onnx, narrower shapes (--visual-tokens, --text-tokens), or another version of TensorRT."
            )
        file.file.flush()
        layers = network_layers(network)
        found = _check_merge_layers(graph, plan, layers, plugin_layers, merge_op)
        engine_layers = inspect_plan(toolkit, plan, sms, log)
    return BuiltPlan(layers, engine_layers, found, None if cache is None else bytes(memoryview(cache.serialize())))
