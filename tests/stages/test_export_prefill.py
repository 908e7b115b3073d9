"""The stages of a prompt that is merged at its prefill: their structure, and that the others are as they were."""

from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir
import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import MergeConfig
from d3tom_export.cpu.place import tuned_graph
from d3tom_export.errors import D3tomError
from d3tom_export.plugins.merge_op import DOMAIN, OP_TYPE
from d3tom_export.stages.contract import stage_specs
from d3tom_export.stages.export import _TRACED_SIZES
from tests.stages.test_export import _caches, _load, _tensors

CONTRACT = {
    "prompt_front": ("prompt_embeddings(B,P,32)", f"prompt_hidden(B,P,32) {_caches('', 'B,P,2,8', range(2))}"),
    "prompt_merge": ("prompt_hidden(B,P,32) visual_positions(V) kept(B,K)", "prompt_merged(B,C,32)"),
    "prompt_back": ("prompt_merged(B,C,32)", _caches("", "B,C,2,8", range(2, 4))),
}
"""Written out by hand, as that of the other stages."""


@pytest.mark.parametrize("stage", CONTRACT)
def test_tensors_are_the_contracts(prefill_bundle: Bundle, stage: str) -> None:
    graph = _load(prefill_bundle, stage).graph
    assert (_tensors(graph.input), _tensors(graph.output)) == CONTRACT[stage]
    onnx.checker.check_model(prefill_bundle.folder / f"{stage}.onnx")


def test_they_take_the_place_of_the_prefill_alone(prefill_bundle: Bundle, bundle: Bundle) -> None:
    stages, plain = prefill_bundle.manifest.stages, bundle.manifest.stages
    assert [name for name in stages if name in plain] == [name for name in plain if name != "prefill"]
    assert set(stages) - set(plain) == set(CONTRACT)
    for name in set(stages) & set(plain):
        assert stages[name] == plain[name]
        assert _load(prefill_bundle, name) == _load(bundle, name)
    uncached = stage_specs(bundle.config, MergeConfig(1, 0.7, merge_at="prefill"), 8, ("uncached",))
    assert uncached == stage_specs(bundle.config, MergeConfig(1, 0.7), 8, ("uncached",))


def test_the_merge_is_one_node_with_a_body(prefill_bundle: Bundle) -> None:
    for stage in CONTRACT:
        model = _load(prefill_bundle, stage)
        nodes = [node for node in model.graph.node if node.domain == DOMAIN]
        assert [(node.op_type, len(node.output)) for node in nodes] == [(OP_TYPE, 1)] * (stage == "prompt_merge")
        assert [function.name for function in model.functions] == ([OP_TYPE] if nodes else [])


def test_nothing_depends_on_data_and_no_traced_size_is_baked_in(prefill_bundle: Bundle) -> None:
    for stage in CONTRACT:
        graph = _load(prefill_bundle, stage).graph
        for node in graph.node:
            assert node.op_type not in ("NonZero", "Compress", "Unique", "Loop", "If", "TopK")
            if node.op_type.startswith("Scatter"):
                assert [a.s for a in node.attribute if a.name == "reduction"] in ([], [b"none"])
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT64 and not tensor.external_data:
                found = set(onnx.numpy_helper.to_array(tensor).ravel().tolist())
                assert not found & set(_TRACED_SIZES.values()), (stage, tensor.name, found)


def test_every_layer_is_the_prompt_s_once_but_for_the_merge_s_own(prefill_bundle: Bundle) -> None:
    """Layer l* lies in `prompt_merge` whole, its keys and values in `prompt_front` too; the last one is only those."""
    weights = prefill_bundle.manifest.stage_weights
    layers = {stage: Counter(name.split(".")[3] for name in weights[stage] if ".blocks." in name) for stage in CONTRACT}
    keys_and_values = 3  # a norm and two products, without biases
    assert layers == {
        "prompt_front": {"0": 9, "1": keys_and_values},
        "prompt_merge": {"1": 9},
        "prompt_back": {"2": 9, "3": keys_and_values},
    }


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("prompt_front", {"RMSNormalization": 3, "RotaryEmbedding": 2, "Attention": 1, "Softmax": 0}),
        ("prompt_merge", {"RMSNormalization": 2, "RotaryEmbedding": 2, "Attention": 1, "D3ToMMerge": 0, "Sqrt": 1}),
        ("prompt_back", {"RMSNormalization": 3, "RotaryEmbedding": 2, "Attention": 1, "Softmax": 0}),
    ],
)
def test_what_is_in_a_tuned_graph(prefill_bundle: Bundle, stage: str, expected: dict[str, int]) -> None:
    ops = Counter(node.op_type for node in ir.load(tuned_graph(prefill_bundle.folder, "fp32", stage)).graph)
    assert {name: ops[name] for name in expected} == expected


def test_the_last_layer_is_none_to_merge_a_prefill_at() -> None:
    merge = MergeConfig(3, 0.7, merge_at="prefill")
    with pytest.raises(D3tomError, match="no layer behind it would read"):
        merge.check_layer(4)
    merge.check_layer(5)
    assert merge.in_loop(False).merge_at == "step"
    assert MergeConfig.from_json(merge.to_json()) == merge
