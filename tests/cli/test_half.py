"""``--precision fp16`` and ``bf16`` on ONNX Runtime as users call it: added to a bundle, run, proven, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.bundle import output
from d3tom_export.bundle.folder import Bundle, load_bundle, write_manifest
from d3tom_export.bundle.half import HALF_PRECISIONS, half_file
from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.config import LOOPS
from d3tom_export.errors import D3tomError
from tests.conftest import Invoke


@pytest.fixture(scope="module")
def folder(tiny_bundle: Bundle, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's bundle with graphs in both half precisions."""
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path_factory.mktemp("half") / "bundle"))
    for precision in HALF_PRECISIONS:
        result = invoke("build", "--bundle", folder, "--precision", precision)
        assert result.exit_code == 0, result.output
        assert f"has {precision} graphs for ONNX Runtime" in result.stdout
        assert f"validate {folder} --precision {precision}`" in result.stdout
    return folder


def test_the_graphs_are_listed_and_are_in_half_precision(folder: Path, invoke: Invoke) -> None:
    bundle = load_bundle(folder)
    for precision, dtype in (("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)):
        for key, spec in bundle.manifest.stages.items():
            assert half_file(precision, key) in (bundle.files or {})
            model = onnx.load_from_string(bundle.graph(key, precision))
            graph, names = model.graph, {tensor.name for tensor in model.graph.initializer}
            assert [value.name for value in graph.input] == [tensor.name for tensor in spec.inputs]
            assert not names & {value.name for value in graph.input}  # every input is a real one
            assert not model.functions  # the merge stands in it as standard operators
            low = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == dtype}
            products = [node.output[0] for node in graph.node if node.op_type == "MatMul"]
            assert not products or low & set(products)  # and not products of float32 between casts
            hidden = [value for value in (*graph.input, *graph.output) if value.name in ("hidden", "merged", "keys")]
            assert {value.type.tensor_type.elem_type for value in hidden} <= {dtype}
            assert output._BEING_ADDED.fullmatch(half_file(precision, key))  # a killed command's are told apart
    inspected = invoke("inspect", folder)
    assert inspected.exit_code == 0, inspected.output


@pytest.mark.parametrize("loop", LOOPS)
def test_fp16_passes_its_values_from_stage_to_stage_in_fp16(folder: Path, loop: str) -> None:
    backend = OnnxRuntimeBackend(load_bundle(folder), loop, device="cpu", precision="fp16")  # type: ignore[arg-type]
    types = {stage: backend.stages[stage].types for stage in backend.stages}
    assert types["merge"]["hidden"] == types["front"]["hidden"] == "tensor(float16)"
    assert types["back"]["logits"] == types["back"]["confidence"] == "tensor(float)"
    if loop == "cached":
        assert backend.stages["prefill"].empty("keys_0", (1, 2, 2, 4)).data_type() == "tensor(float16)"


def test_fp16_answers_and_is_proven_against_pytorch_in_fp16(folder: Path, invoke: Invoke) -> None:
    for cache in ("--kv-cache", "--no-kv-cache"):
        answer = invoke("run", folder, "--prompt", "What?", "--precision", "fp16", cache, "--json", "-")
        assert answer.exit_code == 0, answer.output
    fewer = ("--samples", 1, "--step-ratio", 0.084, "--device", "cpu", "--kv-cache")  # tests/test_agreement.py: without
    result = invoke("validate", folder, "--precision", "fp16", *fewer, "--json", "-")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["passed"], record["precision"], record["backend"]) == (True, "fp16", "onnxruntime")
    assert record["steps"] == 4
    # It is fp16 that ran: float32 differs from PyTorch in fp16 by no more, but not from itself.
    assert 1e-5 < record["max_relative_logit_error"] < 0.02
    timed = invoke(
        "bench", folder, "--precision", "fp16", "--rounds", 1, "--gen-length", 4, "--no-memory", "--json", "-"
    )
    assert timed.exit_code == 0, timed.output
    assert json.loads(timed.stdout)["precision"] == "fp16"


def test_stages_in_fp16_run_one_by_one(folder: Path, invoke: Invoke) -> None:
    call = ("validate", folder, "--precision", "fp16", "--first-bad-stage", "--no-kv-cache", "--device", "cpu")
    result = invoke(*call)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("PASSED: onnxruntime (fp16)")


def test_bf16_runs_where_there_are_kernels_and_is_refused_with_the_reason_elsewhere(
    folder: Path, invoke: Invoke
) -> None:
    result = invoke("run", folder, "--prompt", "What?", "--precision", "bf16", "--device", "cpu")
    if result.exit_code == 0:  # an onnxruntime later than those that this was written with
        return
    said = " ".join(result.stderr.split())
    assert f"ONNX Runtime {ort.__version__} has not the kernels to run" in said
    assert "in bf16 on the CPU. Take --precision fp16 or fp32 there, or a GPU with --provider cuda." in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--precision", "fp16", "--layers"], "on onnxruntime --first-bad-stage names the stage"),
        (["--precision", "bf16", "--first-bad-stage"], "look into bf16 in engines alone"),
        (["--precision", "fp16", "--graphs", "both"], "--graphs chooses between the two kinds of float32 graphs"),
    ],
)
def test_calls_that_mean_nothing(folder: Path, invoke: Invoke, arguments: list[object], says: str) -> None:
    result = invoke("validate", folder, *arguments)
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.stderr.split())
    case = invoke("validate", "--case", folder, "--precision", "fp16")
    assert (case.exit_code, "--case holds float32" in case.stderr) == (2, True)


def test_graphs_that_no_manifest_lists_or_of_another_stage_do_not_run(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "bundle"))
    shutil.copy(copy / half_file("fp16", "front"), copy / half_file("fp16", "back"))
    write_manifest(copy, load_bundle(folder).manifest)
    with pytest.raises(D3tomError, match="are not those of stage back"):
        OnnxRuntimeBackend(load_bundle(copy), device="cpu", precision="fp16")
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    del manifest["files"][half_file("fp16", "back")]
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(D3tomError, match=r"no graphs in fp16, or not all of them.*build --bundle .* --precision fp16"):
        OnnxRuntimeBackend(load_bundle(copy), device="cpu", precision="fp16")
