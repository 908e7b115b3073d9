"""The stage by which questions share a picture's prefill: its structure, and that the others are as they were."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.config import LOOPS, MergeConfig
from d3tom_export.cpu.place import tuned_graph
from d3tom_export.errors import D3tomError
from d3tom_export.export.request import StageRequest
from d3tom_export.stages.contract import stage_specs
from d3tom_export.stages.export import _TRACED_SIZES
from tests.stages.test_export import _caches, _load, _tensors

EARLY, LATE = _caches("attention_", "B,2,P,8", range(2)), _caches("merged_", "B,2,C,8", range(2, 3))
CONTRACT = {
    "step": f"prompt_embeddings(B,S,32) {_caches('attention_', 'B,2,P,8', range(3))}",
    "prefill": f"prompt_embeddings(B,S,32) {EARLY} {LATE}",
}
"""Written out by hand, as that of the other stages. The last layer reads no cache."""


@pytest.fixture(params=CONTRACT)
def built(request: pytest.FixtureRequest, sharing_bundle: Bundle, sharing_prefill_bundle: Bundle) -> Bundle:
    return sharing_bundle if request.param == "step" else sharing_prefill_bundle


def test_tensors_are_the_contracts(built: Bundle) -> None:
    graph = _load(built, "extend").graph
    outputs = _caches("", "B,S,2,8", range(4))
    assert (_tensors(graph.input), _tensors(graph.output)) == (CONTRACT[built.manifest.merge.merge_at], outputs)
    onnx.checker.check_model(built.folder / "extend.onnx")


def test_default_bundles_have_exactly_the_other_stages(built: Bundle, bundle: Bundle, prefill_bundle: Bundle) -> None:
    plain = bundle if built.manifest.merge.merge_at == "step" else prefill_bundle
    assert not plain.manifest.shares_prefix
    assert built.manifest.shares_prefix
    stages = built.manifest.stages
    assert [name for name in stages if name != "extend"] == list(plain.manifest.stages)
    for name in plain.manifest.stages:
        assert stages[name] == plain.manifest.stages[name]
        assert _load(built, name) == _load(plain, name)
    uncached = (stage_specs(built.config, MergeConfig(1, 0.7), 8, ("uncached",), shares) for shares in (True, False))
    assert len({tuple(each) for each in uncached}) == 1


def test_nothing_depends_on_data_and_no_traced_size_is_baked_in(built: Bundle) -> None:
    graph = _load(built, "extend").graph
    for node in graph.node:
        assert node.op_type not in ("NonZero", "Compress", "Unique", "Loop", "If", "TopK")
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64 and not tensor.external_data:
            found = set(onnx.numpy_helper.to_array(tensor).ravel().tolist())
            assert not found & set(_TRACED_SIZES.values()), (tensor.name, found)


def test_cached_and_new_rows_are_multiplied_apart(built: Bundle) -> None:
    """No cache is concatenated with anything: what reads it is a product, or its transpose or size."""
    graph = _load(built, "extend").graph
    caches = {value.name for value in graph.input if value.name != "prompt_embeddings"}
    readers = Counter(node.op_type for node in graph.node if caches & set(node.input))
    assert readers["MatMul"] >= 3  # values; keys are transposed first
    assert not set(readers) - {"MatMul", "Transpose", "Shape", "Reshape"}


def test_the_last_layer_is_its_keys_and_values_alone(built: Bundle) -> None:
    weights = built.manifest.stage_weights["extend"]
    assert Counter(name.split(".")[3] for name in weights if ".blocks." in name) == {"0": 9, "1": 9, "2": 9, "3": 3}
    ops = Counter(node.op_type for node in ir.load(tuned_graph(built.folder, "fp32", "extend")).graph)
    assert {name: ops[name] for name in ("RMSNormalization", "RotaryEmbedding", "Attention", "Softmax")} == {
        "RMSNormalization": 7,
        "RotaryEmbedding": 6,
        "Attention": 3,
        "Softmax": 0,
    }


@pytest.mark.parametrize("shares", [True, False])
def test_a_manifest_that_says_otherwise_is_refused(
    bundle: Bundle, sharing_bundle: Bundle, shares: bool, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree((bundle if shares else sharing_bundle).folder, tmp_path / "bundle"))
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest | {"shares_prefix": shares}))
    with pytest.raises(D3tomError, match="has the stages"):
        load_bundle(folder)


def test_it_is_of_the_loop_with_a_cache(bundle: Bundle) -> None:
    with pytest.raises(D3tomError, match="--share-prefix concerns the loop with a KV cache"):
        StageRequest(MergeConfig(1, 0.7), ("uncached",), share_prefix=True)
    assert "extend" in stage_specs(bundle.config, MergeConfig(1, 0.7), 8, LOOPS, True)
