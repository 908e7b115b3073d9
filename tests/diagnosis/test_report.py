"""The report as text and as JSON, and what repeats it by hand."""

from __future__ import annotations

import json
import runpy
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from d3tom_export.diagnosis.by_hand import polygraphy_command, save_inputs
from d3tom_export.diagnosis.compare import Difference
from d3tom_export.diagnosis.layers import Descent, Kind, Layer
from d3tom_export.diagnosis.report import Departure, Diagnosis, StageResult
from d3tom_export.errors import D3tomError
from d3tom_export.parity.validate import Report

OK, BAD, NAN = Difference(1e-6, 2e-6, 1e-4), Difference(0.5, 3.0, 1e-4), Difference(np.inf, np.inf, 1e-4, "it is NaN")


def _diagnosis(kind: Kind | None = None, difference: Difference = BAD) -> Diagnosis:
    cut = Report("pytorch stages", 1e-3, samples=1, steps=4)
    stages = [StageResult("front", "uncached", 1e-4, 4), StageResult("merge", "uncached", 1e-4)]
    stages[0].note("hidden", difference if kind else OK)
    diagnosis = Diagnosis("tensorrt", "fp16", cut, stages)
    if kind:
        stages[0].first = "sample 0, step 1"
        inputs = {"prompt_embeddings": np.ones((1, 9, 32), dtype=np.float32), "deciders": np.array([[True, False]])}
        diagnosis.first = Departure("front", "uncached", "sample 0, step 1", {"hidden": difference}, inputs)
        layers = [Layer("graph on ONNX Runtime: hidden", difference), Layer("blocks.0.q_proj", difference)]
        diagnosis.descent = Descent(kind, "blocks.0.q_proj", difference, "linear", graph=Path("b/front.onnx"))
        diagnosis.descent.stream, diagnosis.descent.layers = ["add_1", "add_2"], layers
    return diagnosis


def test_nothing_found_is_passed_and_says_what_did_not_run() -> None:
    lines = _diagnosis().lines()
    assert lines == [
        "PASSED: tensorrt (fp16), 1 answer, stage by stage",
        "  stage  calls  largest error  allowed",
        "  front      4        1.0e-06    1e-04  ok",
        "  merge      0              -    1e-04  not run by these steps",
        "  the stages in PyTorch against the eager model: largest logit difference 0.0e+00 (allowed 1e-03), ok",
        "Nothing departs.",
    ]


def test_a_diagnosis_that_compared_nothing_has_not_passed() -> None:
    assert not Diagnosis("tensorrt", "fp16", Report("pytorch stages", 1e-3)).passed
    without_stages = _diagnosis()
    without_stages.stages.clear()
    assert not without_stages.passed


@pytest.mark.parametrize("kind", ["module", "operations", "backend", "accumulated"])
@pytest.mark.parametrize("difference", [BAD, NAN])
def test_a_departure_is_told_in_words_and_in_json(kind: Kind, difference: Difference) -> None:
    diagnosis = _diagnosis(kind, difference)
    lines = diagnosis.lines()
    assert lines[0].startswith("FAILED: tensorrt")
    assert "DEPARTS in hidden" in lines[2]
    assert "first at sample 0, step 1" in lines[2]
    assert "front" in lines[-1]
    assert ("it is NaN" if difference is NAN else "relative error 5.0e-01 (allowed 1e-04)") in lines[-1]
    record = json.loads(json.dumps(diagnosis.to_json(), allow_nan=False))
    assert record["passed"] is False
    assert record["first_bad_stage"]["where"] == "sample 0, step 1"
    assert record["layers"]["kind"] == kind
    assert record["layers"]["error"] == (None if difference is NAN else 0.5)
    assert [layer["name"] for layer in record["layers"]["judged"]] == [
        "graph on ONNX Runtime: hidden",
        "blocks.0.q_proj",
    ]


def test_the_worst_difference_is_kept_and_nan_is_the_worst() -> None:
    result = StageResult("back", "uncached", 1e-4)
    for output, difference in (("a", OK), ("b", BAD), ("c", OK), ("d", NAN), ("e", BAD)):
        result.note(output, difference)
    assert (result.output, result.worst) == ("d", NAN)


def test_the_inputs_are_saved_for_polygraphy(tmp_path: Path) -> None:
    diagnosis = _diagnosis("module")
    assert diagnosis.descent is not None
    diagnosis.descent.graph = tmp_path / "front.onnx"
    onnx.save(_takes({"prompt_embeddings": TensorProto.FLOAT16, "deciders": TensorProto.BOOL}), tmp_path / "front.onnx")
    loader = save_inputs(diagnosis, tmp_path / "inputs")
    assert loader is not None
    (feed,) = runpy.run_path(str(loader))["load_data"]()
    assert diagnosis.first is not None
    assert feed.keys() == diagnosis.first.inputs.keys()
    assert all(np.array_equal(feed[name], array) for name, array in diagnosis.first.inputs.items())
    assert (feed["prompt_embeddings"].dtype, feed["deciders"].dtype) == (np.float16, np.bool_)
    (tmp_path / "file").write_text("")
    with pytest.raises(D3tomError, match="cannot be written"):
        save_inputs(diagnosis, tmp_path / "file")
    assert save_inputs(_diagnosis(), tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def _takes(types: dict[str, int]) -> onnx.ModelProto:
    """A graph that takes inputs of ``types``."""
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]
    node = helper.make_node("Identity", [next(iter(types))], ["out"])
    outputs = [helper.make_tensor_value_info("out", next(iter(types.values())), None)]
    return helper.make_model(helper.make_graph([node], "front", inputs, outputs))


@pytest.mark.parametrize(("kind", "marked"), [("module", ["linear"]), ("backend", ["add_1", "add_2"])])
def test_the_command_marks_what_is_to_be_compared(kind: Kind, marked: list[str]) -> None:
    diagnosis = _diagnosis(kind)
    diagnosis.backend = "tensorrt-rtx"
    command = polygraphy_command(diagnosis, loader=Path("in puts.py"))
    assert command is not None
    environment, *words = shlex.split(command)
    assert environment == "POLYGRAPHY_USE_TENSORRT_RTX=1"
    assert words[:4] == ["polygraphy", "run", "b/front.onnx", "--trt"]
    for option in ("--onnx-outputs", "--trt-outputs"):
        place = words.index(option) + 1
        assert words[place : place + len(marked)] == marked
    assert words[words.index("--trt-opt-shapes") + 1] == "prompt_embeddings:[1,9,32]"
    assert words[words.index("--rtol") + 1] == "0.006"  # float16's
    assert words[words.index("--data-loader-script") + 1] == "in puts.py"


def test_the_command_is_for_engines_and_loads_their_plugin() -> None:
    diagnosis = _diagnosis("backend")
    assert "--strongly-typed" in str(polygraphy_command(diagnosis, None))
    assert "INPUTS.py" in str(polygraphy_command(diagnosis, None))
    assert diagnosis.first is not None
    assert diagnosis.descent is not None
    diagnosis.first.stage, diagnosis.descent.graph = "cached_merge", Path("b/cached_merge.fp16-plugin.onnx")
    command = str(polygraphy_command(diagnosis, None))
    assert "--plugins libd3tom_export_plugin.so" in command
    assert "--onnxrt" not in command
    diagnosis.backend = "onnxruntime"
    assert polygraphy_command(diagnosis, None) is None
    assert polygraphy_command(_diagnosis(), None) is None
