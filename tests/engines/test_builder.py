"""One engine at a time, really built by TensorRT-RTX on this CPU, and what is said where it cannot be."""

from __future__ import annotations

import _thread
import errno
import io
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.engines import builder
from d3tom_export.engines.build import plugin_layers
from d3tom_export.engines.builder import BuilderSettings, BuiltPlan, build_plan, check_target
from d3tom_export.engines.cuda import Gpu, gpus
from d3tom_export.engines.graph import engine_graph
from d3tom_export.engines.record import MergeOp
from d3tom_export.engines.shapes import Profile, axis_ranges, default_shapes, stage_profile
from d3tom_export.engines.stages import engine_stages, stage_profiles
from d3tom_export.engines.toolkit import Toolkit, ToolkitName, load_toolkit
from d3tom_export.errors import D3tomError
from d3tom_export.plugins.merge_op import OP_TYPE
from d3tom_export.plugins.merge_plugin import register_merge_plugin


def _build(toolkit: Toolkit, graph: Path, profile: Profile, sm: int = 89, **options: Any) -> BuiltPlan:
    """By default with standard layers in place of the merge, for SM89; the plan comes to lie beside the graph."""
    plan = plan_of(graph)
    plan.unlink(missing_ok=True)
    settings = {"merge_op": "onnx", "plugin_layers": 0, "settings": BuilderSettings()}
    return build_plan(toolkit, graph, [profile], [sm], plan, **settings | options)


def plan_of(graph: Path) -> Path:
    return graph.with_suffix(".plan")


@pytest.fixture(scope="module")
def rtx() -> Toolkit:
    return load_toolkit("tensorrt-rtx")


@pytest.fixture(scope="module")
def graphs(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`front` and `merge` in fp16, with standard layers and with the plugin, beside their weights."""
    folder = tmp_path_factory.mktemp("graphs")
    for path in bundle.folder.glob("*.safetensors"):
        shutil.copy(path, folder)
    for key in ("front", "merge"):
        for merge_op in ("onnx", "plugin"):
            graph = engine_graph(bundle.folder / stage_file(key), bundle.manifest.stages[key], "fp16", merge_op)
            (folder / f"{key}-{merge_op}.onnx").write_bytes(graph.model)
    return folder


def _profile(bundle: Bundle, key: str) -> Profile:
    manifest = bundle.manifest
    axes = axis_ranges(
        default_shapes(bundle.config, manifest.generation), manifest.merge, manifest.generation, kv_cache=False
    )
    return stage_profile(manifest.stages[key], axes)


def test_layers_tell_what_was_built(bundle: Bundle, graphs: Path, rtx: Toolkit) -> None:
    phases: list[tuple[str, int, int]] = []
    built = _build(
        rtx,
        graphs / "merge-onnx.onnx",
        _profile(bundle, "merge"),
        progress=lambda *phase: phases.append(phase),
    )
    assert built.plugin_layers == 0
    assert built.timing_cache is None  # ahead of time nothing is timed
    assert {layer.type for layer in built.layers} >= {"MATRIX_MULTIPLY", "SOFTMAX", "CAST"}
    assert any("half" in tensor for layer in built.layers for tensor in layer.outputs)
    assert phases
    assert all(0 < done <= steps for _, done, steps in phases)


@pytest.mark.parametrize("sm", [90, 61, 75, 100])
def test_an_architecture_the_toolkit_does_not_know_is_refused(rtx: Toolkit, sm: int) -> None:
    with pytest.raises(D3tomError, match=rf"builds no engines of merging stages for SM{sm}; it does for SM80, .*SM120"):
        check_target(rtx, [89, sm])


def test_a_plugin_nobody_registered_is_named(bundle: Bundle, graphs: Path, rtx: Toolkit) -> None:
    """Under another namespace: that of the real plugin may be registered in this process."""
    model = onnx.load(graphs / "merge-plugin.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "plugin_namespace":
                attribute.s = b"somewhere_else"
        node.domain = "somewhere_else" if node.op_type == OP_TYPE else node.domain
    path = graphs / "merge-unknown.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(D3tomError, match=r"does not know the merge plugin.*--merge-op onnx"):
        _build(rtx, path, _profile(bundle, "merge"), merge_op="plugin", plugin_layers=1)


def test_another_implementation_than_asked_for_is_an_error(bundle: Bundle, graphs: Path, rtx: Toolkit) -> None:
    with pytest.raises(D3tomError, match="has 0 plugin layers and does not name D3ToMMerge, expected 1"):
        _build(rtx, graphs / "merge-onnx.onnx", _profile(bundle, "merge"), merge_op="plugin", plugin_layers=1)
    assert not plan_of(graphs / "merge-onnx.onnx").exists()


def test_a_profile_of_other_inputs_is_refused(bundle: Bundle, graphs: Path, rtx: Toolkit) -> None:
    profile = _profile(bundle, "front")
    del profile["answer_embeddings"]
    with pytest.raises(D3tomError, match=r"network has inputs answer_embeddings, prompt_embeddings, the stage prompt"):
        _build(rtx, graphs / "front-onnx.onnx", profile)


def test_sizes_that_contradict_each_other_fail_with_the_builders_reason(
    bundle: Bundle, graphs: Path, rtx: Toolkit
) -> None:
    profile = _profile(bundle, "merge")
    profile["deciders"] = ((2, 8), (3, 8), (4, 8))  # another batch than `hidden` has
    with pytest.raises(D3tomError, match=r"cannot build merge-onnx\.onnx for SM89: .+ Try --merge-op"):
        _build(rtx, graphs / "merge-onnx.onnx", profile)


def test_a_file_that_is_no_graph_is_refused(bundle: Bundle, graphs: Path, rtx: Toolkit) -> None:
    path = graphs / "broken.onnx"
    path.write_bytes((graphs / "front-onnx.onnx").read_bytes()[:5000])
    with pytest.raises(D3tomError, match=r"cannot read .*broken\.onnx"):
        _build(rtx, path, _profile(bundle, "front"))


def test_one_plan_serves_several_architectures_with_the_weights_once(
    bundle: Bundle, graphs: Path, rtx: Toolkit
) -> None:
    graph, profile = graphs / "front-onnx.onnx", _profile(bundle, "front")
    sizes = []
    for sms in ([89], [89, 120], [80, 86, 89, 120]):
        plan_of(graph).unlink(missing_ok=True)
        settings = BuilderSettings()
        build_plan(rtx, graph, [profile], sms, plan_of(graph), merge_op="onnx", plugin_layers=0, settings=settings)
        sizes.append(plan_of(graph).stat().st_size)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert sizes[2] == pytest.approx(sizes[0], rel=0.01)


def test_the_plan_goes_to_disk_as_the_builder_gives_it(
    bundle: Bundle, graphs: Path, rtx: Toolkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing asks the builder for a whole plan; a disk that is full ends the build with the system's own error."""
    monkeypatch.setattr(rtx.trt.Builder, "build_serialized_network", None)
    graph = graphs / "front-onnx.onnx"
    _build(rtx, graph, _profile(bundle, "front"))
    whole = plan_of(graph).stat().st_size

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    assert whole > 1000
    created = builder.create_file
    monkeypatch.setattr(builder, "create_file", lambda path: created(path) and Full())
    with pytest.raises(OSError, match="No space left"):
        _build(rtx, graph, _profile(bundle, "front"))
    assert not plan_of(graph).exists()


def test_a_toolkit_that_knows_no_streams_gives_the_plan_whole(
    bundle: Bundle, graphs: Path, rtx: Toolkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graphs / "front-onnx.onnx"
    _build(rtx, graph, _profile(bundle, "front"))
    size = plan_of(graph).stat().st_size
    monkeypatch.delattr(rtx.trt.Builder, "build_serialized_network_to_stream")
    _build(rtx, graph, _profile(bundle, "front"))
    assert plan_of(graph).stat().st_size == size


def test_the_gpu_that_is_built_for_is_current_in_the_building_thread(
    rtx: Toolkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT times on the thread's current GPU, and a new thread's is the first."""
    used: list[tuple[Gpu, str]] = []
    machine = [Gpu(0, "L4", 89), Gpu(1, "H100", 90)]
    monkeypatch.setattr(builder, "gpus", lambda: machine)
    monkeypatch.setattr(builder, "use_gpu", lambda gpu: used.append((gpu, threading.current_thread().name)))
    for toolkit in (Toolkit("tensorrt", rtx.trt, "11"), rtx):
        builder._interruptible(builder._build_here(toolkit, [90]), threading.Event())
    ((gpu, thread),) = used  # ahead of time none is needed
    assert gpu == machine[1]
    assert thread.startswith("engine build")


@pytest.fixture
def foreground() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, which Python leaves out where a shell started it in the background."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("foreground")
def test_pressed_twice_ctrl_c_still_waits_for_the_builders_end() -> None:
    cancelled, ended = threading.Event(), threading.Event()

    def work() -> None:
        for _ in range(2):
            time.sleep(0.3)
            _thread.interrupt_main()
        assert cancelled.wait(10)
        time.sleep(0.5)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        builder._interruptible(work, cancelled)
    assert ended.is_set()


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_stops_a_build(bundle: Bundle, graphs: Path, rtx: Toolkit) -> None:
    """The interrupt reaches the main thread as Ctrl-C's does; the builder is told to stop at its next step."""
    steps: list[str] = []

    def progress(phase: str, done: int, total: int) -> None:
        steps.append(phase)
        if len(steps) == 5:
            _thread.interrupt_main()
            time.sleep(0.5)  # long enough for the main thread to take note

    with pytest.raises(KeyboardInterrupt):
        _build(rtx, graphs / "merge-onnx.onnx", _profile(bundle, "merge"), progress=progress)
    assert not [thread.name for thread in threading.enumerate() if "engine build" in thread.name]
    whole: list[str] = []
    _build(
        rtx,
        graphs / "merge-onnx.onnx",
        _profile(bundle, "merge"),
        progress=lambda phase, done, total: whole.append(phase),
    )
    assert len(steps) < len(whole) / 2


def test_tensorrt_builds_only_for_the_gpu_at_hand(rtx: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    at_home = Toolkit("tensorrt", rtx.trt, "10.0")
    monkeypatch.setattr(builder, "gpus", lambda: [Gpu(0, "H100", 90)])
    check_target(at_home, [90])
    with pytest.raises(D3tomError, match=r"engines for SM89 cannot be built here, where the GPU is H100 \(SM90\)"):
        check_target(at_home, [89])


@pytest.mark.slow
def test_the_command_by_hand_builds_the_same_plan(bundle: Bundle, tmp_path: Path) -> None:
    """What `inspect --by-hand` prints, run by a shell: Polygraphy and TensorRT-RTX alone."""
    pytest.importorskip("polygraphy")
    from d3tom_export.engines.build import EngineOptions, build_engines
    from d3tom_export.engines.by_hand import commands
    from d3tom_export.engines.record import Target, built_engines

    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    copy = Bundle(folder, bundle.manifest, bundle.config)
    target = Target("tensorrt-rtx", (89,), "fp16")
    build_engines(copy, [target], EngineOptions(default_shapes(copy.config, copy.manifest.generation), "onnx"))
    record = built_engines(folder)[target]["merge"]
    polygraphy, trtexec = commands(folder, record)
    environment, _, command = polygraphy.partition(" ")
    assert environment == "POLYGRAPHY_USE_TENSORRT_RTX=1"
    program = Path(sys.executable).parent / "polygraphy"
    result = subprocess.run(
        f"{environment} {command.replace('polygraphy', shlex.quote(str(program)), 1)}",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    by_hand = (tmp_path / "merge.plan").stat().st_size
    assert by_hand == pytest.approx(record.plan_bytes, rel=0.01)
    assert re.match(r"tensorrt_rtx --onnx=\S+merge\.fp16-onnx\.onnx --minShapes=hidden:1x", trtexec)


def test_a_plan_that_the_gpu_cannot_open_is_an_error(
    bundle: Bundle, graphs: Path, rtx: Toolkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is claimed where there is none: opening the plan fails for real."""
    if _gpu_of(89):
        pytest.skip("this machine's GPU opens the plan")
    profile = _profile(bundle, "front")
    built = _build(rtx, graphs / "front-onnx.onnx", profile)
    assert built.engine_layers is None
    monkeypatch.setattr(builder, "gpus", lambda: [Gpu(0, "claimed", 89)])
    with pytest.raises(D3tomError, match="built an engine for SM89 that it cannot open on this GPU"):
        _build(rtx, graphs / "front-onnx.onnx", profile)


def _gpu_of(*sms: int) -> Gpu | None:
    try:
        return next((gpu for gpu in gpus() if not sms or gpu.sm in sms), None)
    except D3tomError:
        return None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_the_inspector_tells_the_layers_of_the_engine(bundle: Bundle, graphs: Path, name: ToolkitName) -> None:
    gpu = _gpu_of()
    if gpu is None:
        pytest.skip("no GPU here to open an engine on")
    try:
        toolkit = load_toolkit(name)
        check_target(toolkit, [gpu.sm])
    except D3tomError as error:
        pytest.skip(str(error))
    profile = _profile(bundle, "merge")
    built = _build(toolkit, graphs / "merge-onnx.onnx", profile, gpu.sm)
    assert built.engine_layers["Layers"]
    assert not any("D3ToMMerge" in str(layer) for layer in built.engine_layers["Layers"])
    if not toolkit.ahead_of_time:
        assert built.timing_cache


@pytest.mark.parametrize("merge_op", ["plugin", "onnx"])
def test_the_merge_of_a_prompt_is_built(
    prefill_bundle: Bundle, tmp_path: Path, rtx: Toolkit, merge_op: MergeOp
) -> None:
    """`prompt_merge` as an engine, its one merge node the plugin's or standard layers."""
    manifest, key = prefill_bundle.manifest, "prompt_merge"
    for path in prefill_bundle.folder.glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    spec = engine_stages(manifest.stages, prefill_bundle.config, manifest.merge)[key]
    graph = engine_graph(prefill_bundle.folder / stage_file(key), spec, "fp16", merge_op)
    (tmp_path / "prompt_merge.onnx").write_bytes(graph.model)
    shapes = default_shapes(prefill_bundle.config, manifest.generation)
    (profile,) = stage_profiles(spec, axis_ranges(shapes, manifest.merge, manifest.generation, kv_cache=True))
    if merge_op == "plugin":
        register_merge_plugin(rtx.trt, [89])
    layers = plugin_layers(graph)
    built = _build(rtx, tmp_path / "prompt_merge.onnx", profile, merge_op=merge_op, plugin_layers=layers)
    assert built.plugin_layers == layers == int(merge_op == "plugin")
    assert (b"D3ToMMerge" in plan_of(tmp_path / "prompt_merge.onnx").read_bytes()) == bool(layers)
