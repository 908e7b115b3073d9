"""Graphs of strangers: what ours contain is what is allowed, and what is let through is what a runtime reads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.config import CacheMergeConfig, MergeConfig
from d3tom_export.cpu.tune import write_tuned
from d3tom_export.engines.graph import engine_graph
from d3tom_export.quantize.plan import QuantizeRequest
from d3tom_export.trust.graphs import _OTHER_EXPORTERS, OPERATORS, read_graph, relocated, without_defaults
from tests.conftest import BuildBundle


def _operators(model: ModelProto) -> Iterator[tuple[str, str]]:
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        yield node.domain, node.op_type


@pytest.mark.slow
def test_the_operators_that_are_allowed_are_those_of_our_exports(
    bundle: Bundle, build_bundle: BuildBundle, tmp_path: Path
) -> None:
    """Every way to merge, both loops, standard graphs and those for the CPU in float32 and int8, engines' graphs."""
    bundles = [
        bundle,
        build_bundle(MergeConfig(2, 0.6, aggregate="mean", positions="original")),
        build_bundle(MergeConfig(2, 0.6, select="fastv")),
        build_bundle(MergeConfig(2, 0.6, select="random")),
        build_bundle(MergeConfig(1, 0.6, select="uniform")),
        build_bundle(MergeConfig(1, 0.7, cache=CacheMergeConfig(restore_norm=False)), ("cached",)),
        build_bundle(MergeConfig(1, 0.7, cache=CacheMergeConfig(text_targets=False)), ("cached",)),
    ]
    bundles += [build_bundle(MergeConfig(1, 0.7), quantize=QuantizeRequest(form)) for form in ("int4", "nvfp4")]
    found: set[tuple[str, str]] = set()
    for each in bundles:
        folder = Path(shutil.copytree(each.folder, tmp_path / each.folder.name))
        if not open_checkpoint(folder).quantized:
            write_tuned(folder, each.manifest.stages, each.config.language, each.manifest.merge, "int8")
        graphs = [path.read_bytes() for path in sorted(folder.rglob("*.onnx"))]
        if each is bundle:
            graphs += [
                engine_graph(folder / stage_file(key), spec, precision, merge_op).model  # type: ignore[arg-type]
                for key, spec in each.manifest.stages.items()
                for precision in ("fp16", "bf16")
                for merge_op in ("onnx", "plugin")
            ]
        for graph in graphs:
            model = onnx.load_from_string(graph)
            found |= set(_operators(model))
            read = read_graph(graph)
            assert read.operators <= set(_operators(model))
            assert [tensor.name for tensor in read.outputs] == [value.name for value in model.graph.output]
            assert len(read.weights) == sum(bool(tensor.external_data) for tensor in model.graph.initializer)
    allowed = {(domain, kind) for domain, kinds in OPERATORS.items() for kind in kinds}
    assert found == allowed - {("", kind) for kind in _OTHER_EXPORTERS.split()}


def test_nothing_that_runs_graphs_or_code_is_allowed() -> None:
    schemas = [schema for schema in onnx.defs.get_all_schemas() if not schema.domain]
    with_graphs = {s.name for s in schemas if any(a.type.name in ("GRAPH", "GRAPHS") for a in s.attributes.values())}
    assert {"If", "Loop", "Scan"} <= with_graphs
    assert not with_graphs & OPERATORS[""]
    assert OPERATORS[""] <= {schema.name for schema in schemas}


def test_weights_are_named_anew_and_nothing_else_changes(bundle: Bundle) -> None:
    names = {f"model-0000{n}-of-00002.safetensors": str(n) * 64 for n in (1, 2)}
    for key in bundle.manifest.stages:
        content = (bundle.folder / stage_file(key)).read_bytes()
        wanted = onnx.load_from_string(content)
        for entry in (entry for tensor in wanted.graph.initializer for entry in tensor.external_data):
            entry.value = names.get(entry.value, entry.value)
        assert onnx.load_from_string(relocated(content, names)) == wanted
    assert relocated(content, {}) == content


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_graphs_are_refused_or_read_as_protobuf_reads_them(bundle: Bundle, data: st.DataObject) -> None:
    """What is let through has, for the runtime too, the operators and outputs that were looked at."""
    content = bytearray((bundle.folder / data.draw(st.sampled_from(["embed.onnx", "rotate.onnx"]))).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    try:
        read = read_graph(bytes(content))
    except ValueError:
        return
    try:
        model = onnx.load_from_string(bytes(content))
    except DecodeError:  # in what we do not look into: a runtime refuses it too
        return
    assert read.operators == set(_operators(model))
    assert [tensor.name for tensor in read.outputs] == [value.name for value in model.graph.output]
    assert [weight.file for weight in read.weights] == [
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    ]


def test_inputs_with_a_default_become_inputs_that_have_to_be_given(bundle: Bundle) -> None:
    before = (bundle.folder / "back.onnx").read_bytes()
    model, found = (onnx.load_from_string(data) for data in (before, without_defaults(before)))
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "answer_length"]
    assert len(kept) == len(model.graph.initializer) - 1
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    assert found == model
    assert read_graph(without_defaults(before)).inputs == read_graph(before).inputs
    other = (bundle.folder / "front.onnx").read_bytes()  # none of its inputs has one
    assert without_defaults(other) == other
