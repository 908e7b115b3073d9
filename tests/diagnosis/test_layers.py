"""How a descent works: little is held, whatever the depth, and graphs of engines are looked into as they are."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import Loop
from d3tom_export.diagnosis import probes
from d3tom_export.diagnosis.compare import LAYER_TOLERANCE, STAGE_TOLERANCE, TIED_SIMILARITY
from d3tom_export.diagnosis.graph import ModuleValues, StageGraph
from d3tom_export.diagnosis.layers import Descender, Descent
from d3tom_export.diagnosis.probes import Examination, Probe
from d3tom_export.diagnosis.reference import ReferenceStage
from d3tom_export.diagnosis.trail import INPUT, OUTPUT, START, Point, See
from d3tom_export.engines.graph import engine_graph
from d3tom_export.model.lavida import Lavida
from d3tom_export.stages.cut import stage_modules
from tests.diagnosis.conftest import Tamper, bump, change_weight, multiply_after

BLOCKS = "model.transformer.blocks"


def _stage(bundle: Bundle, model: Lavida, name: str, loop: Loop) -> ReferenceStage:
    module = stage_modules(model, bundle.manifest.merge, [loop])[name]
    key = next(key for key, spec in bundle.manifest.stages.items() if (spec.name, spec.loop) == (name, loop))
    return ReferenceStage(bundle.manifest.stages[key], module, lambda *_: None)


def _merge_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "hidden": rng.normal(size=(1, 40, 32)).astype(np.float32),
        "deciders": np.array([[True, False, True, False]]),
        "visual_positions": np.arange(3, 33),
        "keep": np.array([8]),
    }


def _descend(
    stage: ReferenceStage,
    model: Lavida,
    inputs: dict[str, np.ndarray],
    path: Path,
    outputs: Sequence[str],
    p: str = "fp32",
) -> Descent:
    names = {id(module): name for name, module in model.named_modules()}
    tolerances = STAGE_TOLERANCE[p], LAYER_TOLERANCE[p]
    return Descender(stage, inputs, StageGraph(path), names, tolerances, TIED_SIMILARITY[p]).run(outputs)


@pytest.mark.parametrize("weight", ["3.v_proj", "2.ff_out", "0.q_proj"])
def test_two_activations_are_held_however_deep_the_fault(
    weight: str, bundle: Bundle, eager_model: Lavida, tamper: Tamper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what the modules themselves keep: the graph's results and the tensors seen are counted as they die."""
    live: set[int] = set()
    peaks: list[int] = []
    seen: list[weakref.ref[Tensor]] = []
    run, walk = StageGraph.run, probes.walk

    class Counted(np.ndarray):
        pass

    def counted_run(self: StageGraph, *arguments: Any) -> np.ndarray:
        result = run(self, *arguments).view(Counted)
        live.add(id(result))
        weakref.finalize(result, live.discard, id(result))
        peaks.append(len(live))
        return result

    def watched_walk(module: Any, arguments: Any, see: See, *more: Any) -> Any:
        def watched(point: Point, tensors: Sequence[Tensor]) -> None:
            seen.extend(weakref.ref(tensor) for tensor in tensors)
            see(point, tensors)

        return walk(module, arguments, watched, *more)

    monkeypatch.setattr(StageGraph, "run", counted_run)
    monkeypatch.setattr(probes, "walk", watched_walk)
    path = tamper("prefill", change_weight(f"{BLOCKS}.{weight}.weight", bump)).folder / "prefill.onnx"
    stage = _stage(bundle, eager_model, "prefill", "cached")
    inputs = {"prompt_embeddings": np.random.default_rng(1).normal(size=(1, 50, 32)).astype(np.float32)}
    outputs = [spec.name for spec in stage.spec.outputs]
    descent = _descend(stage, eager_model, inputs, path, outputs)
    assert descent.name == f"{BLOCKS}.{weight}"
    # At any time one result of the graph, beside the one tensor that it came from or is compared with.
    assert len(peaks) > 10
    assert max(peaks) == 1
    gc.collect()
    assert not live
    assert len(seen) > 100
    assert not [tensor for tensor in seen if tensor() is not None]


def test_probes_of_one_pass_may_meet_but_not_overlap(bundle: Bundle, eager_model: Lavida) -> None:
    stage = _stage(bundle, eager_model, "merge", "uncached")
    examination = Examination(stage, _merge_inputs(), StageGraph(bundle.folder / "merge.onnx"))
    norm, query = (examination.calls[index].values for index in (0, 1))
    assert isinstance(norm, ModuleValues)
    assert isinstance(query, ModuleValues)
    first = Probe(Point(0, INPUT), norm.inputs, Point(1, INPUT), norm.output, 0, "norm")
    second = Probe(Point(1, INPUT), query.inputs, Point(1, OUTPUT), query.output, 0, "query")
    assert [probe.name for probe, _ in examination.judge([first, second], 1e-5)] == ["norm", "query"]
    with pytest.raises(AssertionError, match="overlap"):
        examination.judge([first, second._replace(start=Point(0, OUTPUT))], 1e-5)


def test_judging_stops_at_the_first_departure(bundle: Bundle, eager_model: Lavida) -> None:
    stage = _stage(bundle, eager_model, "merge", "uncached")
    examination = Examination(stage, _merge_inputs(), StageGraph(bundle.folder / "merge.onnx"))
    made = [
        Probe(Point(index, INPUT), call.values.inputs, Point(index, OUTPUT), call.values.output, 0, call.scope)
        for index, call in enumerate(examination.calls)
        if isinstance(call.values, ModuleValues)
    ]
    assert len(examination.judge(made, 1e-4)) == 10
    wrong = made[3]._replace(target=made[2].target)
    found = examination.judge([*made[:3], wrong, *made[4:]], 1e-4)
    assert [probe.name for probe, difference in found if difference.departs] == ["block.v_proj"]
    assert len(found) == 4


def test_errors_that_only_add_up_are_said_to(bundle: Bundle, eager_model: Lavida) -> None:
    """Every part within its tolerance, the whole beyond its own."""
    stage = _stage(bundle, eager_model, "front", "uncached")
    rng = np.random.default_rng(3)
    inputs = {
        name: rng.normal(size=(1, 9, 32)).astype(np.float32) for name in ("prompt_embeddings", "answer_embeddings")
    }
    names = {id(module): name for name, module in eager_model.named_modules()}
    graph = StageGraph(bundle.folder / "front.onnx")
    descent = Descender(stage, inputs, graph, names, (1e-12, 1e-3), 5e-7).run(["hidden"])
    assert descent.kind == "accumulated"
    assert 0 < descent.difference.error < 1e-3


def test_modules_that_the_graph_does_not_show_are_counted(bundle: Bundle, eager_model: Lavida, tamper: Tamper) -> None:
    """Nodes without their scopes, as after a pass that fused them; the fault is placed around what is left."""

    def fuse(model: Any, folder: Path) -> None:
        for node in model.graph.node:
            if f"{BLOCKS}.1.k_proj" in str(node.metadata_props) or "block.k_proj" in str(node.metadata_props):
                del node.metadata_props[:]
        change_weight(f"{BLOCKS}.1.k_proj.weight", bump)(model, folder)

    path = tamper("merge", fuse).folder / "merge.onnx"
    descent = _descend(_stage(bundle, eager_model, "merge", "uncached"), eager_model, _merge_inputs(), path, ["merged"])
    assert list(descent.skipped) == [f"{BLOCKS}.1.k_proj"]
    assert "no node of it" in descent.skipped[f"{BLOCKS}.1.k_proj"]
    assert (descent.kind, descent.towards) == ("operations", f"{BLOCKS}.1.attn_out")
    assert any(node.startswith("MatMul node_linear") for node in descent.nodes)


def _half(bundle: Bundle, name: str) -> Path:
    """The stage's graph as a float16 engine has it, its merge left to the plugin."""
    graph = engine_graph(bundle.folder / f"{name}.onnx", bundle.manifest.stages[name], "fp16", "plugin")
    path = bundle.folder / f"{name}.fp16-plugin.onnx"
    path.write_bytes(graph.model)
    return path


@pytest.mark.parametrize("module", ["attn_norm", "q_proj", "ff_proj"])
def test_an_engines_half_precision_graph_is_looked_into(
    module: str, bundle: Bundle, eager_model: Lavida, tamper: Tamper
) -> None:
    """Tokens between two kept ones go either way in float16: the modules behind the merge are not blamed for it."""
    inputs = _merge_inputs()
    inputs["hidden"][0, 20] = inputs["hidden"][0, 21] * np.float32(1.0005)  # a twin: half precision cannot rank them
    stage = _stage(bundle, eager_model, "merge", "uncached")
    good = _half(tamper("merge", lambda model, folder: None), "merge")
    intact = _descend(stage, eager_model, inputs, good, ["merged"], "fp16")
    assert intact.kind in ("backend", "accumulated")
    bad = _half(tamper("merge", change_weight(f"{BLOCKS}.1.{module}.weight", lambda w: bump(w))), "merge")
    descent = _descend(stage, eager_model, inputs, bad, ["merged"], "fp16")
    assert (descent.kind, descent.name) == ("module", f"{BLOCKS}.1.{module}")


def test_where_a_part_does_not_run_is_where_it_departs(bundle: Bundle, eager_model: Lavida, tamper: Tamper) -> None:
    def misshape(model: Any, folder: Path) -> None:
        node = next(node for node in model.graph.node if f"{BLOCKS}.1.ff_out.weight" in node.input)
        del node.attribute[:]
        node.op_type = "Identity"  # the weight is no longer transposed: the product behind it cannot be

    path = tamper("merge", misshape).folder / "merge.onnx"
    descent = _descend(_stage(bundle, eager_model, "merge", "uncached"), eager_model, _merge_inputs(), path, ["merged"])
    assert descent.name == f"{BLOCKS}.1.ff_out"
    assert "cannot run the part" in str(descent.difference.problem)


def test_the_probe_of_a_stage_without_modules_is_the_stage(bundle: Bundle, eager_model: Lavida, tamper: Tamper) -> None:
    path = tamper("rotate", multiply_after("Cos", 1.1)).folder / "rotate.onnx"
    rng = np.random.default_rng(5)
    inputs = {name: rng.normal(size=(1, 12, 2, 8)).astype(np.float32) for name in ("keys", "values")}
    stage = _stage(bundle, eager_model, "rotate", "cached")
    descent = _descend(stage, eager_model, inputs, path, ["attention_keys", "attention_values"])
    assert (descent.kind, descent.name, descent.value) == ("operations", "rotate", "attention_keys")
    assert replace(descent.difference, tolerance=1.0).departs is False
    assert START < Point(0, INPUT) < Point(0, OUTPUT)
    with torch.inference_mode():
        assert descent.layers[0].name == "graph on ONNX Runtime: attention_keys"
