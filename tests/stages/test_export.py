"""Exported graphs: structure first (names, axes, nodes, weights, no baked sizes), then the default input."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import hollow_model
from d3tom_export.checkpoint.stored import stored_tensors
from d3tom_export.config import LOOPS, GenerationConfig, Loop, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.plugins.merge_op import DOMAIN, OP_TYPE, ROWS
from d3tom_export.stages.contract import DYNAMIC, StageSpec, TensorSpec, stage_specs
from d3tom_export.stages.cut import stage_modules
from d3tom_export.stages.export import _TRACED_SIZES, OPSET, export_stage
from tests.conftest import BuildBundle

# The contract of design.md, written out by hand: B, P, G, L, V, K, M, C dynamic, 32 wide, 272 rows of the head, 28 px,
# 16 per view; 4 layers cut at 1, 2 key/value heads of 8.
_GREEDY = "token(B,G) confidence(B,G) doubt(B,G) logits(B,G,272)"
_DECIDE = (
    "hidden(B,G,32) deciders(B,G) visual_positions(V) keep(1) attention_keys_1(B,2,P,8) attention_values_1(B,2,P,8)"
)


def _caches(form: str, axes: str, layers: range) -> str:
    return " ".join(f"{form}{kind}_{layer}({axes})" for layer in layers for kind in ("keys", "values"))


CONTRACT = {
    "vision": ("pixel_values(views,3,28,28)", "visual_features(views,16,32)"),
    "embed": ("token_ids(B,S)", "embeddings(B,S,32)"),
    "front": ("prompt_embeddings(B,P,32) answer_embeddings(B,G,32)", "hidden(B,L,32)"),
    "merge": ("hidden(B,L,32) deciders(B,G) visual_positions(V) keep(1)", "merged(B,M,32) kept(B,K)"),
    "back": ("merged(B,M,32) answer_length(1)", _GREEDY),
    "prefill": ("prompt_embeddings(B,P,32)", _caches("", "B,P,2,8", range(4))),
    "rotate": ("keys(B,P,2,8) values(B,P,2,8)", "attention_keys(B,2,P,8) attention_values(B,2,P,8)"),
    "cached_front": (f"answer_embeddings(B,G,32) {_caches('attention_', 'B,2,P,8', range(1))}", "hidden(B,G,32)"),
    "decide": (_DECIDE, "merged(B,G,32) kept(B,K)"),
    "cached_merge": (
        f"{_DECIDE} {_caches('', 'B,P,2,8', range(2, 4))}",
        f"merged(B,G,32) kept(B,K) {_caches('merged_', 'B,2,C,8', range(2, 4))}",
    ),
    "cached_back": (f"merged(B,G,32) {_caches('merged_', 'B,2,C,8', range(2, 4))}", _GREEDY),
    "certainty": ("logits(B,G,272)", "rest(B,G) runner_up(B,G) rest_entropy(B,G)"),
}
MERGE_NODES = {"merge": (1, 1), "cached_merge": (2, 2)}
"""Merge nodes of a stage and their row inputs: the residual stream's one, or one for both layers' keys and values."""


def _load(bundle: Bundle, stage: str) -> onnx.ModelProto:
    return onnx.load(bundle.folder / f"{stage}.onnx", load_external_data=False)


def _tensors(values: object) -> str:
    def axes(value: onnx.ValueInfoProto) -> str:
        return ",".join(dim.dim_param or str(dim.dim_value) for dim in value.type.tensor_type.shape.dim)

    return " ".join(f"{value.name}({axes(value)})" for value in values)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", CONTRACT)
def test_tensors_are_the_contracts(bundle: Bundle, stage: str) -> None:
    graph = _load(bundle, stage).graph
    assert (_tensors(graph.input), _tensors(graph.output)) == CONTRACT[stage]


@pytest.mark.parametrize("stage", CONTRACT)
def test_checker_passes_and_the_opset_is_the_chosen_one(bundle: Bundle, stage: str) -> None:
    onnx.checker.check_model(bundle.folder / f"{stage}.onnx")
    opsets = {entry.domain: entry.version for entry in _load(bundle, stage).opset_import}
    assert opsets[""] == OPSET
    assert set(opsets) <= {"", DOMAIN}


def test_the_merge_is_one_node_with_a_body(bundle: Bundle) -> None:
    for stage in CONTRACT:
        model = _load(bundle, stage)
        nodes = [node for node in model.graph.node if node.domain == DOMAIN]
        count, rows = MERGE_NODES.get(stage, (0, 0))
        assert [node.op_type for node in nodes] == [OP_TYPE] * count
        for node in nodes:
            assert (len(node.input), len(node.output)) == (rows + 2, rows)
            attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            assert attributes == ({ROWS: rows} if rows > 1 else {})
        assert [function.name for function in model.functions] == ([OP_TYPE] if nodes else [])


def test_no_step_copies_a_cache_of_p_rows(bundle: Bundle) -> None:
    """Full caches are multiplied, averaged over heads, regrouped in place or gathered from: never concatenated,
    repeated, transposed as a whole or rotated."""
    for stage in ("cached_front", "decide", "cached_merge"):
        graph = _load(bundle, stage).graph
        caches = {value.name for value in graph.input if "keys_" in value.name or "values_" in value.name}
        for node in graph.node:
            if not caches & set(node.input):
                continue
            attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            if node.op_type == "Transpose":  # of keys, for their product with the queries: a flag of the product
                assert attributes["perm"] == [0, 1, 3, 2]
                readers = {reader.op_type for reader in graph.node if node.output[0] in reader.input}
                assert readers == {"MatMul"}
            else:
                assert node.op_type in {"MatMul", "Shape", "Reshape", "ReduceMean"}, (stage, node.op_type)


def test_both_loops_share_the_weights(bundle: Bundle) -> None:
    """Every tensor of the checkpoint is read by the uncached loop; the cached one adds none."""
    weights = bundle.manifest.stage_weights
    cached = {name for key, spec in bundle.manifest.stages.items() if spec.loop == "cached" for name in weights[key]}
    uncached = {name for key, spec in bundle.manifest.stages.items() if spec.loop != "cached" for name in weights[key]}
    assert cached
    assert cached <= uncached


def test_no_graph_has_a_data_dependent_shape_or_a_reducing_scatter(bundle: Bundle) -> None:
    for stage in CONTRACT:
        for node in _load(bundle, stage).graph.node:
            assert node.op_type not in ("NonZero", "Compress", "Unique", "Loop", "If", "TopK")
            if node.op_type.startswith("Scatter"):
                reductions = [attribute.s for attribute in node.attribute if attribute.name == "reduction"]
                assert reductions in ([], [b"none"])


def test_no_traced_size_is_baked_in(bundle: Bundle) -> None:
    """No integer constant equals a size the tracer saw; none of them is a size of the model."""
    suspicious = set(_TRACED_SIZES.values())
    assert len(suspicious) == len(_TRACED_SIZES)
    for stage in CONTRACT:
        for tensor in _load(bundle, stage).graph.initializer:
            # The tower's position ids 0..48 are the model's own.
            own = tensor.external_data or tensor.name.endswith("position_ids")
            if tensor.data_type == onnx.TensorProto.INT64 and not own:
                found = set(onnx.numpy_helper.to_array(tensor).ravel().tolist()) & suspicious
                assert not found, (stage, tensor.name, found)


def test_weights_are_stored_once_under_their_checkpoint_names(bundle: Bundle) -> None:
    stored = stored_tensors(bundle.folder)
    users: dict[Loop | None, Counter[str]] = {None: Counter(), "uncached": Counter(), "cached": Counter()}
    for stage in CONTRACT:
        for tensor in _load(bundle, stage).graph.initializer:
            if not tensor.external_data:
                size = int(np.prod(tensor.dims)) if tensor.dims else 1
                assert size <= 64, f"{stage} holds {tensor.name} of {size} elements inside the graph"
                continue
            users[bundle.manifest.stages[stage].loop][tensor.name] += 1
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == stored[tensor.name].file.name
            assert int(place["offset"]) == stored[tensor.name].offset
            assert int(place["length"]) <= stored[tensor.name].length
        assert sorted(bundle.manifest.stage_weights[stage]) == sorted(
            tensor.name for tensor in _load(bundle, stage).graph.initializer if tensor.external_data
        )
    uncached = users[None] + users["uncached"]
    assert set(uncached.values()) == {1}
    unused = "model.vision_tower.vision_tower.vision_model.post_layernorm.weight"
    assert set(stored) - set(uncached) == {"model.image_newline", unused}  # one is packed on the host
    # With a cache a layer runs twice, over the prompt and over the answer; l* once more where it merges no cache.
    assert max(users["cached"].values()) == 3
    table, head = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
    assert (users[None][table], users["cached"][table], users["cached"][head]) == (1, 0, 1)


def test_graphs_carry_no_path_of_the_machine_that_made_them(bundle: Bundle) -> None:
    for stage in CONTRACT:
        raw = (bundle.folder / f"{stage}.onnx").read_bytes()
        assert b".py" not in raw
        assert str(Path.cwd()).encode() not in raw


@pytest.mark.parametrize(("layer", "front", "back"), [(0, 0, 3), pytest.param(3, 3, 0, marks=pytest.mark.slow)])
def test_the_cut_puts_every_layer_into_one_stage(build_bundle: BuildBundle, layer: int, front: int, back: int) -> None:
    weights = build_bundle(MergeConfig(layer, 0.7)).manifest.stage_weights

    def layers(stage: str) -> set[str]:
        return {name.split(".")[3] for name in weights[stage] if ".blocks." in name}

    assert (len(layers("front")), layers("merge"), len(layers("back"))) == (front, {str(layer)}, back)


def test_back_takes_the_bundles_answer_length_by_default(bundle: Bundle) -> None:
    session = ort.InferenceSession(str(bundle.folder / "back.onnx"), providers=["CPUExecutionProvider"])
    assert [tensor.name for tensor in session.get_inputs()] == ["merged"]
    merged = np.random.default_rng(0).normal(size=(2, 30, 32)).astype(np.float32)
    default = session.run(["logits"], {"merged": merged})[0]
    given = session.run(["logits"], {"merged": merged, "answer_length": np.array([5])})[0]
    assert default.shape == (2, 8, 272)
    np.testing.assert_allclose(default[:, -5:], given, atol=1e-5)


def test_a_graph_that_departs_from_the_contract_is_refused(bundle: Bundle, eager_model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    merge = bundle.manifest.merge
    spec = stage_specs(bundle.config, merge, 8, LOOPS)["embed"]
    wrong = StageSpec("embed", spec.inputs, (TensorSpec("embeddings", "float32", ("B", "S", 33)),))
    stored = stored_tensors(bundle.folder)
    places = {id(p): (name, stored[name]) for name, p in eager_model.named_parameters()}
    with pytest.raises(D3tomError, match=r"output embeddings has axes .* expected \['B', 'S', 33\]"):
        export_stage(wrong, stage_modules(eager_model, merge, ["uncached"])["embed"], tmp_path / "embed.onnx", places)
    assert not list(tmp_path.iterdir())


def test_options_add_their_tensors_and_nothing_else(bundle: Bundle) -> None:
    plain = stage_specs(bundle.config, MergeConfig(1, 0.5), 8, LOOPS)
    merge = MergeConfig(1, 0.5, select="random", positions="original")
    optional = stage_specs(bundle.config, merge, 8, LOOPS)
    added = {
        tensor.name
        for name in plain
        for tensor in (*optional[name].inputs, *optional[name].outputs)
        if tensor not in (*plain[name].inputs, *plain[name].outputs)
    }
    assert added == {"selection_scores", "positions"}
    for spec in optional.values():
        for tensor in (*spec.inputs, *spec.outputs):
            assert all(axis in DYNAMIC for axis in tensor.axes if isinstance(axis, str))
    assert GenerationConfig(gen_length=8).gen_length == plain["back"].inputs[1].default


def test_no_file_that_is_there_becomes_a_graph(checkpoint_folder: Path, tmp_path: Path) -> None:
    """A shard called like a stage, linked into the bundle, was once written over: the user's weights were gone."""
    checkpoint = open_checkpoint(checkpoint_folder)
    merge = MergeConfig(1, 0.5)
    model = hollow_model(checkpoint)
    specs, modules = stage_specs(checkpoint.config, merge, 8, LOOPS), stage_modules(model, merge, LOOPS)
    places = {id(parameter): (name, checkpoint.tensors[name]) for name, parameter in model.named_parameters()}
    theirs = tmp_path / "theirs.safetensors"
    theirs.write_bytes(b"precious")
    folder = tmp_path / "bundle"
    folder.mkdir()
    for make in (Path.hardlink_to, Path.symlink_to):
        make(folder / "embed.onnx", theirs)
        with pytest.raises(FileExistsError):
            export_stage(specs["embed"], modules["embed"], folder / "embed.onnx", places)
        (folder / "embed.onnx").unlink()
    assert theirs.read_bytes() == b"precious"
    assert list(folder.iterdir()) == []
    export_stage(specs["embed"], modules["embed"], folder / "embed.onnx", places)
    assert [path.name for path in folder.iterdir()] == ["embed.onnx"]
