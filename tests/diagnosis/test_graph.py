"""Questions to a stage's graph: whose a value is, and what a part of it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from d3tom_export.bundle.folder import Bundle
from d3tom_export.diagnosis.graph import ModuleValues, StageGraph
from d3tom_export.errors import D3tomError
from tests.diagnosis.conftest import Tamper, multiply_after

BLOCK = "model.transformer.blocks.0"


@pytest.fixture
def front(bundle: Bundle) -> StageGraph:
    return StageGraph(bundle.folder / "front.onnx")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def _feeds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    rows = {"prompt_embeddings": 9, "answer_embeddings": 4}
    return {name: rng.normal(size=(1, count, 32)).astype(np.float32) for name, count in rows.items()}


def test_a_modules_values_are_found(front: StageGraph) -> None:
    norm, query = front.module_values("blocks.0.attn_norm"), front.module_values("blocks.0.q_proj")
    assert isinstance(norm, ModuleValues)
    assert isinstance(query, ModuleValues)
    assert query.inputs == (norm.output,)
    assert front.weights(front.part(query.output, query.inputs)) == [f"{BLOCK}.q_proj.weight"]
    assert front.weights(front.part(norm.output, norm.inputs)) == [f"{BLOCK}.attn_norm.weight"]
    assert front.node_name(query.output).startswith("MatMul ")


def test_what_the_graph_does_not_show_is_said(front: StageGraph) -> None:
    assert "no node of it" in str(front.module_values("blocks.7.q_proj"))
    assert "expected one and one" in str(front.module_values("blocks.0"))
    assert front.merges() == []


def test_a_part_computes_what_the_whole_does_and_no_more(front: StageGraph, rng: np.random.Generator) -> None:
    feeds = _feeds(rng)
    query = front.module_values("blocks.0.q_proj")
    assert isinstance(query, ModuleValues)
    given = front.run(query.inputs[0], feeds)
    assert given.shape == (1, 13, 32)
    straight = front.run(query.output, feeds)
    assert np.allclose(front.run(query.output, {query.inputs[0]: given}, query.inputs), straight, atol=1e-5)
    doubled = front.run(query.output, {query.inputs[0]: 2 * given}, query.inputs)
    assert np.allclose(doubled, 2 * straight, atol=1e-4)
    assert len(front.part(query.output, query.inputs)) < 5 < len(front.part("hidden", ()))
    assert {*feeds, query.output, query.inputs[0]} <= front.ancestors("hidden")


def test_a_part_that_does_not_run_is_an_error_of_ours(front: StageGraph) -> None:
    query = front.module_values("blocks.0.q_proj")
    assert isinstance(query, ModuleValues)
    with pytest.raises(D3tomError, match=r"cannot run the part of front\.onnx up to"):
        front.run(query.output, {query.inputs[0]: np.zeros((1, 3, 5), dtype=np.float32)}, query.inputs)


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "front.onnx").write_bytes(b"not a graph")
    with pytest.raises(D3tomError, match="cannot be read as ONNX"):
        StageGraph(tmp_path / "front.onnx")


def test_nodes_that_a_pass_put_into_a_module_belong_to_it(
    tamper: Tamper, front: StageGraph, rng: np.random.Generator
) -> None:
    """Casts and the like carry no scope, and the values that a pass makes no type."""
    graph = StageGraph(tamper("front", multiply_after("Reciprocal", 3.0)).folder / "front.onnx")
    norm = graph.module_values("blocks.0.attn_norm")
    assert isinstance(norm, ModuleValues)
    assert norm == front.module_values("blocks.0.attn_norm")
    assert "tampered" in [node.name for node in graph.part(norm.output, norm.inputs)]
    feeds = {norm.inputs[0]: rng.normal(size=(1, 6, 32)).astype(np.float32)}
    right = front.run(norm.output, feeds, norm.inputs)
    assert np.allclose(graph.run(norm.output, feeds, norm.inputs), 3 * right, rtol=1e-5)


def test_a_weight_may_be_scaled_on_its_way(tamper: Tamper) -> None:
    """A module's input is what depends on the stage's; a weight behind a node of a pass is none."""

    def scale(model: onnx.ModelProto, folder: Path) -> None:
        (transpose,) = (node for node in model.graph.node if f"{BLOCK}.q_proj.weight" in node.input)
        place = list(model.graph.node).index(transpose)
        model.graph.node.insert(place, helper.make_node("Neg", [f"{BLOCK}.q_proj.weight"], ["negated"], name="pass"))
        model.graph.node[place + 1].input[0] = "negated"

    graph = StageGraph(tamper("front", scale).folder / "front.onnx")
    values = graph.module_values("blocks.0.q_proj")
    assert isinstance(values, ModuleValues)
    assert len(values.inputs) == 1


def test_merge_nodes_without_a_body_get_one(tamper: Tamper, bundle: Bundle, rng: np.random.Generator) -> None:
    """As an engine's graph has them: the plugin's name and nothing to fall back on."""

    def without_body(model: onnx.ModelProto, folder: Path) -> None:
        del model.functions[:]
        for node in model.graph.node:
            if node.op_type == "D3ToMMerge":
                node.attribute.append(helper.make_attribute("plugin_namespace", "d3tom_export"))

    graph = StageGraph(tamper("merge", without_body).folder / "merge.onnx")
    whole = StageGraph(bundle.folder / "merge.onnx")
    (values,) = graph.merges()
    hidden, normed = rng.normal(size=(2, 1, 10, 32)).astype(np.float32)
    feeds = dict(zip(values.inputs, (hidden, normed, np.array([[1, 4, 7]])), strict=True))
    merged = graph.run(values.output, feeds, values.inputs)
    assert np.array_equal(merged, whole.run(values.output, feeds, values.inputs))
    assert np.allclose(merged.sum(axis=1), hidden.sum(axis=1), atol=1e-4)
