"""The graph that an engine is built from: the merge node as chosen, every input real, the same bytes each time."""

from __future__ import annotations

import onnx
import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.engines.build import plugin_layers
from d3tom_export.engines.graph import EngineGraph, engine_graph
from d3tom_export.engines.record import MERGE_OPS, PRECISIONS, EnginePrecision, MergeOp
from d3tom_export.plugins.merge_op import DOMAIN, OP_TYPE


def _engine(bundle: Bundle, key: str, precision: EnginePrecision, merge_op: MergeOp) -> EngineGraph:
    return engine_graph(bundle.folder / stage_file(key), bundle.manifest.stages[key], precision, merge_op)


def _graph(bundle: Bundle, key: str, precision: EnginePrecision, merge_op: MergeOp) -> onnx.ModelProto:
    return onnx.load_from_string(_engine(bundle, key, precision, merge_op).model)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("key", "nodes", "rows"), [("merge", 1, 1), ("cached_merge", 2, 2), ("front", 0, 0)])
def test_merge_nodes_name_the_plugin_or_give_way_to_their_body(
    bundle: Bundle, key: str, nodes: int, rows: int, precision: EnginePrecision
) -> None:
    """Keys and values of a layer are merged by one node; ``cached_merge`` has two layers'."""
    for merge_op in MERGE_OPS:
        model = _graph(bundle, key, precision, merge_op)
        merges = [node for node in model.graph.node if node.domain == DOMAIN]
        assert not model.functions  # with one, a builder without the plugin would silently take it
        if merge_op == "onnx":
            assert not merges
            continue
        if merge_op == "aot":  # two plugins a search and one a sum, each to be embedded
            assert [node.op_type for node in merges] == ["D3ToMNearest", "D3ToMOrder", *["D3ToMSum"] * rows] * nodes
            assert plugin_layers(_engine(bundle, key, precision, merge_op)) == len(merges)
            continue
        assert len(merges) == nodes
        for node in merges:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert node.op_type == OP_TYPE
            assert attributes == {"plugin_namespace": b"d3tom_export", "plugin_version": b"1", "rows": rows}
            assert len(node.output) == rows


def test_an_optional_input_becomes_a_real_one(bundle: Bundle) -> None:
    model = _graph(bundle, "back", "fp32", "onnx")
    assert "answer_length" in [value.name for value in model.graph.input]
    assert "answer_length" not in [tensor.name for tensor in model.graph.initializer]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_stay_in_their_file(bundle: Bundle, precision: EnginePrecision) -> None:
    before = onnx.load(bundle.folder / "back.onnx", load_external_data=False)
    after = _graph(bundle, "back", precision, "plugin")
    outside = [
        {t.name: [(e.key, e.value) for e in t.external_data] for t in model.graph.initializer if t.data_location}
        for model in (before, after)
    ]
    assert outside[0] == outside[1]
    assert all(places[0][1].endswith(".safetensors") for places in outside[0].values())
    assert after.ByteSize() < 200_000


def test_the_same_graph_gives_the_same_bytes(bundle: Bundle) -> None:
    graphs = {_graph(bundle, "cached_merge", "bf16", "onnx").SerializeToString(deterministic=True) for _ in range(3)}
    assert len(graphs) == 1
