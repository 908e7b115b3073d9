"""What the TensorRT backend refuses, and that it does so before a plan is deserialized or a request runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from d3tom_export.backends.tensorrt import TensorRTBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.cli.main import main
from d3tom_export.config import GenerationConfig, Loop, MergeConfig
from d3tom_export.cpu.place import CPU_PRECISIONS
from d3tom_export.engines.cuda import Gpu, gpus
from d3tom_export.engines.memory import engines_memory
from d3tom_export.engines.record import PRECISIONS, Target, built_engines, plan_file, record_file
from d3tom_export.engines.toolkit import load_toolkit
from d3tom_export.errors import D3tomError
from d3tom_export.pipeline import run_loop
from tests.backends.conftest import FP32
from tests.backends.fake_cuda import FakeDevice
from tests.backends.fake_engines import ADA, Machine, own_bundle, write_engines
from tests.backends.fake_tensorrt import FakeRuntime, Severity
from tests.backends.test_tensorrt import LOOPS, prompt_of
from tests.conftest import picture

RTX = Target("tensorrt-rtx", (89,), "fp32")
HOPPER = Gpu(0, "Fake H200", 90)


@pytest.fixture
def built(bundle: Bundle, tmp_path: Path) -> Bundle:
    """Engines of its own, for tests that break them."""
    own = own_bundle(bundle, tmp_path / "bundle")
    write_engines(own, FP32)
    return own


def _refused(machine: Machine, bundle: Bundle, **options: Any) -> str:
    with pytest.raises(D3tomError) as refusal:
        machine.backend(bundle, **options)
    assert machine.trt is None or machine.trt.deserialized == 0
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_no_engines_at_all(bundle: Bundle, machine: Machine) -> None:
    said = _refused(machine, bundle)
    assert "no engines of tensorrt for this GPU, Fake RTX 4090 (SM89); it has none at all" in said
    assert f"`d3tom-export build --bundle {bundle.folder} --engine tensorrt --sm 89`" in said


def test_engines_of_another_architecture(engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    said = _refused(Machine(monkeypatch, [HOPPER]), engines)
    assert "Fake H200 (SM90); it has tensorrt, SM89, fp32" in said
    assert "--engine tensorrt --sm 90` on a machine with such a GPU" in said


def test_the_first_gpu_that_has_engines_is_taken(engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, [HOPPER, Gpu(1, "Fake L4", 89)])
    machine.backend(engines)
    assert [gpu.index for gpu in machine.opened] == [1]


def test_engines_of_the_other_toolkit_or_of_another_precision(engines: Bundle, machine: Machine) -> None:
    said = _refused(machine, engines, toolkit="tensorrt-rtx")
    assert "no engines of tensorrt-rtx" in said
    assert said.endswith("--engine tensorrt-rtx --sm 89`.")  # ahead of time: any machine builds them
    assert "no engines of tensorrt in bf16" in _refused(machine, engines, precision="bf16")
    assert "--sm 89 --precision bf16`" in _refused(machine, engines, precision="bf16")


def test_several_precisions_want_a_choice(built: Bundle, machine: Machine) -> None:
    write_engines(built, Target("tensorrt", (89,), "fp16"))
    assert "for SM89 in fp16, fp32. Choose one with --precision" in _refused(machine, built)
    assert machine.backend(built, precision="fp16").precision == "fp16"


def test_tensorrt_rtx_does_not_know_hopper(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    write_engines(built, Target("tensorrt-rtx", (90,), "fp32"))
    said = _refused(Machine(monkeypatch, [HOPPER]), built, toolkit="tensorrt-rtx")
    assert "does not run on this GPU, Fake H200 (SM90): it knows SM89, SM120" in said
    assert "--backend tensorrt" in said


def test_another_version_of_tensorrt(engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    said = _refused(Machine(monkeypatch, version="12.0.0.1"), engines)
    assert "was built by tensorrt 11.4.0.106, and 12.0.0.1 is installed" in said
    assert "--sm 89 --precision fp32`" in said
    assert 'pip install "tensorrt==11.4.0.106"' in said


def _edit_record(bundle: Bundle, key: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = record_file(bundle.folder / FP32.folder, key)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_engines_of_other_weights(built: Bundle, machine: Machine) -> None:
    _edit_record(built, "front", lambda raw: raw["content"].update(weights="0" * 64))
    assert "engine of front" in _refused(machine, built)
    assert "built from other weights than this bundle's" in _refused(machine, built)


def test_a_stage_without_engine(built: Bundle, machine: Machine) -> None:
    plan_file(built.folder / FP32.folder, "back").unlink()
    assert "incomplete: there is none of back" in _refused(machine, built)
    machine.backend(built, "cached")  # whose stage of that name is another


@pytest.mark.parametrize(
    ("damage", "says"), [(lambda data: data[:-9], "is truncated: it has"), (lambda data: data[::-1], "is damaged")]
)
def test_truncated_and_damaged_plans(
    built: Bundle, machine: Machine, damage: Callable[[bytes], bytes], says: str
) -> None:
    plan = plan_file(built.folder / FP32.folder, "merge")
    plan.write_bytes(damage(plan.read_bytes()))
    assert says in _refused(machine, built)


def test_a_plan_that_tensorrt_does_not_take(built: Bundle, machine: Machine) -> None:
    plan = plan_file(built.folder / FP32.folder, "embed")
    plan.write_bytes(b"a plan of nothing")
    from d3tom_export.bundle.folder import file_sha256

    _edit_record(built, "embed", lambda raw: raw.update(plan_bytes=17, plan_sha256=file_sha256(plan)))
    with pytest.raises(D3tomError, match=r"cannot load engine .*embed.plan: magic tag does not match"):
        machine.backend(built)


def test_an_engine_that_is_not_what_its_record_says(built: Bundle, machine: Machine) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["inputs"][0]["dtype"] = "float16"
        raw["outputs"][0]["name"] = "other"

    _edit_record(built, "merge", change)
    with pytest.raises(D3tomError, match=r"stage merge is not what its record says: other is missing, merged is not"):
        machine.backend(built)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Stands in for the registration of the plugin; notes with which TensorRT it was called."""
    from d3tom_export.plugins import library, merge_plugin

    called: list[object] = []

    def register(trt: Any) -> None:
        assert trt.deserialized == 0
        called.append(trt)

    monkeypatch.setattr(library, "register_merge_runtime", register)
    monkeypatch.setattr(merge_plugin, "plugin_identity", lambda: "a" * 64)
    return called


def test_the_plugin_is_registered_before_engines_that_hold_it(
    bundle: Bundle, engines: Bundle, machine: Machine, plugin: list[object], tmp_path: Path
) -> None:
    machine.backend(engines)
    assert plugin == []
    own = own_bundle(bundle, tmp_path / "bundle")
    write_engines(own, FP32, plugin="a" * 64)
    for loop in ("uncached", "cached"):
        machine.backend(own, loop)
    assert len(plugin) == 2
    # Ahead-of-time plugins are inside the engine: nothing is registered, whatever this version's plugin is.
    inside = own_bundle(bundle, tmp_path / "inside")
    write_engines(inside, FP32, plugin="c" * 64, merge_op="aot")
    machine.backend(inside)
    assert len(plugin) == 2


def test_another_plugin_and_none(
    bundle: Bundle, machine: Machine, plugin: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own_bundle(bundle, tmp_path / "bundle")
    write_engines(own, FP32, plugin="b" * 64)
    said = _refused(machine, own)
    assert "engine of merge holds the merge plugin bbbbbbbbbbbb, and this d3tom-export has aaaaaaaaaaaa" in said
    assert "--merge-op onnx" in said
    monkeypatch.setitem(sys.modules, "d3tom_export.plugins.merge_plugin", None)
    assert "hold the merge plugin, which cannot be imported here" in _refused(machine, own)
    assert plugin == []


@pytest.mark.parametrize(
    ("loop", "prompt", "answer", "says", "option"),
    [
        (
            "uncached",
            (1, 500, range(3, 450)),
            6,
            r"visual_positions of shape \(1..400\).* needs \(447\)",
            "visual-tokens",
        ),
        (
            "cached",
            (1, 500, range(3, 450)),
            6,
            r"visual_positions of shape \(1..400\).* needs \(447\)",
            "visual-tokens",
        ),
        ("uncached", (1, 700, range(3, 30)), 6, "prompt_embeddings", "text-tokens"),
        ("cached", (1, 700, range(3, 30)), 6, "rotate was built for keys", "text-tokens"),
        ("uncached", (5, 60, range(3, 30)), 6, "prompt_embeddings", "batch"),
        ("uncached", (1, 60, range(3, 30)), 40, "answer_embeddings", "answer-tokens"),
        ("cached", (1, 60, range(3, 30)), 40, "answer_embeddings", "answer-tokens"),
    ],
)
def test_a_request_outside_the_profile_names_the_option_that_widens_it(
    engines: Bundle, machine: Machine, loop: Loop, prompt: tuple[Any, ...], answer: int, says: str, option: str
) -> None:
    backend = machine.backend(engines, loop)
    small = run_loop(backend, prompt_of(1, 20), 258, GenerationConfig(gen_length=2), MergeConfig(1, 0.7))
    list(small)
    machine.device.log.clear()
    with pytest.raises(D3tomError, match=says) as refusal:
        list(run_loop(backend, prompt_of(*prompt), 258, GenerationConfig(gen_length=answer), MergeConfig(1, 0.7)))
    assert f"with a wider --{option} (min:opt:max) of `d3tom-export build --bundle`" in str(refusal.value)
    prompt_stages = {"front", "decide", "back", "rotate"} if loop == "cached" and answer == 40 else set()
    assert set(machine.device.log) == prompt_stages  # an answer's length is known at its first step


def test_a_tall_stack_of_views_and_a_long_question(engines: Bundle, machine: Machine) -> None:
    backend = machine.backend(engines)
    with pytest.raises(D3tomError, match="The model's picture grid needs more views"):
        backend.encode_views(np.zeros((7, 3, 28, 28), np.float32))
    with pytest.raises(D3tomError, match=r"token_ids of shape \(1..4, 1..600\).*wider --text-tokens"):
        backend.embed_tokens(np.zeros((1, 601), np.int64))


def test_without_tensorrt_or_without_a_gpu(engines: Bundle, built: Bundle) -> None:
    """On the real libraries: the first is not installed here, the second has no GPU, unless this is such a machine."""
    try:
        load_toolkit("tensorrt")
    except D3tomError:
        with pytest.raises(D3tomError, match=r"Engines of tensorrt need the package tensorrt"):
            TensorRTBackend(engines)
    try:
        load_toolkit("tensorrt-rtx")
    except D3tomError as error:
        pytest.skip(str(error))
    try:
        pytest.skip(f"there is a GPU: {gpus()[0]}")
    except D3tomError:
        write_engines(built, RTX)
    with pytest.raises(D3tomError, match=r"^CUDA .* run this bundle with --backend onnxruntime, which needs no GPU"):
        TensorRTBackend(built, toolkit="tensorrt-rtx")


# On the command line


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backend", "tensorrt", "--device", "cpu"], "Engines run on NVIDIA GPUs"),
        (["--backend", "tensorrt", "--provider", "tensorrt"], "is ONNX Runtime's way to TensorRT"),
        (["--provider", "cuda", "--provider-cache", "kept"], "--provider-cache is for --backend onnxruntime"),
        (["--provider", "cuda", "--precision", "int8"], "--precision int8 is for the CPU"),
        (
            ["--backend", "pytorch", "--no-cuda-graphs", "--precision", "fp16"],
            "--precision and --no-cuda-graphs concern",
        ),
        (["--backend", "tensorrt", "--precision", "int8"], "--precision int8 is for the CPU"),
        (["--precision", "int4"], "'int4' is not one of"),
        (["--keep-multiple", 0], "Invalid value for '--keep-multiple'"),
    ],
)
def test_calls_that_no_backend_would_follow(engines: Bundle, arguments: list[str], says: str) -> None:
    for command in (
        ["run", engines.folder, "--prompt", "What?"],
        ["validate", engines.folder],
        ["bench", engines.folder],
    ):
        result = _invoke(*command, *arguments)
        assert result.exit_code == 2, result.output
        assert says in result.stderr


def test_run_validate_and_bench_on_engines(engines: Bundle, machine: Machine, tmp_path: Path) -> None:
    image = tmp_path / "picture.png"
    picture(70, 50).save(image)
    question = ["run", engines.folder, "--image", image, "--prompt", "What?", "--json", "-", "--keep-multiple", 16]
    result = _invoke(*question, "--backend", "tensorrt")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["backend"], record["merge"]["keep_multiple"]) == ("tensorrt", 16)
    assert record["kept_per_step"][1:] == [
        min(-(-keep // 16) * 16, record["visual_tokens"]) for keep in _kept(engines, image)
    ]
    assert json.loads(_invoke(*question).stdout)["token_ids"] == record["token_ids"]

    engine = ["--backend", "tensorrt", "--no-cuda-graphs", "--precision", "fp32"]
    proven = _invoke("validate", engines.folder, *engine, "--samples", 1, "--keep-multiple", 8)
    assert proven.exit_code == 0, proven.output
    assert proven.stdout.startswith("PASSED: tensorrt, 2 answers, 16 steps")
    timed = _invoke("bench", engines.folder, *engine, "--rounds", 1, "--gen-length", 4, "--json", "-")
    assert timed.exit_code == 0, timed.output
    assert {row["peak_bytes"] for row in json.loads(timed.stdout)["rows"]} == {None}  # the GPU's memory is not measured
    case = _invoke("validate", "--case", engines.folder, "--backend", "tensorrt")
    assert (case.exit_code, "build engines of a BUNDLE" in case.stderr) == (2, True)


def _kept(engines: Bundle, image: Path) -> list[int]:
    plain = _invoke("run", engines.folder, "--image", image, "--prompt", "What?", "--json", "-")
    assert plain.exit_code == 0, plain.output
    return json.loads(plain.stdout)["kept_per_step"][1:]


def test_a_refusal_is_one_paragraph_and_exit_code_1(bundle: Bundle, machine: Machine) -> None:
    result = _invoke("run", bundle.folder, "--prompt", "What?", "--backend", "tensorrt")
    assert result.exit_code == 1
    assert "has no engines of tensorrt" in result.stderr
    assert "Traceback" not in result.output


def test_doctor_tells_of_every_toolkit() -> None:
    backends = {entry["name"]: entry for entry in json.loads(_invoke("doctor", "--json", "-").stdout)["backends"]}
    assert {"tensorrt", "tensorrt-rtx", "build (engines)"} <= backends.keys()
    for name in ("tensorrt", "tensorrt-rtx"):
        assert backends[name]["usable"] or backends[name]["remedy"]


def test_doctor_on_machines_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from d3tom_export import doctor
    from d3tom_export.engines import cuda

    try:
        load_toolkit("tensorrt-rtx")
    except D3tomError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(cuda, "gpus", lambda: [ADA])
    finding = {finding.name: finding for finding in doctor.examine()}["tensorrt-rtx"]
    assert finding.usable
    assert "Fake RTX 4090 (SM89)" in finding.found
    monkeypatch.setattr(cuda, "gpus", lambda: [HOPPER])
    finding = {finding.name: finding for finding in doctor.examine()}["tensorrt-rtx"]
    assert not finding.usable
    assert "not on Fake H200 (SM90)" in finding.found
    assert finding.remedy.startswith("--backend tensorrt")


def test_the_options_name_the_precisions_that_runtimes_have() -> None:
    from d3tom_export.backends import choice

    assert set(choice.PRECISIONS) == {*PRECISIONS, *CPU_PRECISIONS}
    assert choice.CPU_PRECISIONS == CPU_PRECISIONS


@pytest.mark.parametrize("loop", LOOPS)
def test_engines_that_do_not_fit_the_gpu_are_refused_before_one_is_opened(
    engines: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch, loop: Loop
) -> None:
    records = built_engines(engines.folder)[FP32].values()
    loops = [record for record in records if record.loop in (None, loop)]
    need = engines_memory(loops, engines.config.language)
    enough = need.weights + need.cache + need.buffers
    monkeypatch.setattr(FakeDevice, "memory", enough)
    assert machine.backend(engines, loop).device.memory == enough  # type: ignore[attr-defined]
    monkeypatch.setattr(FakeDevice, "memory", enough - 1)
    with pytest.raises(D3tomError, match=r"has 0\.0 of its 0\.0 GiB free, and these engines need") as said:
        machine.backend(engines, loop)
    assert machine.trt is not None
    assert machine.trt.deserialized == 0
    assert "`nvidia-smi` lists them" in str(said.value)
    assert "--precision fp16 or bf16 need half of it" in str(said.value)


def test_an_engine_that_finds_no_memory_is_not_to_be_built_again(
    engines: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(runtime: FakeRuntime, plan: Any) -> None:
        runtime._logger.log(Severity.ERROR, "Requested amount of GPU memory (8589934592 bytes) could not be allocated")

    monkeypatch.setattr(FakeRuntime, "deserialize_cuda_engine", refuse)
    with pytest.raises(D3tomError, match="The GPU has too little memory left for it: close other programs") as said:
        machine.backend(engines)
    assert "Build it again" not in str(said.value)
