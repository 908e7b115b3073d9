"""The operator's body of standard ops against the eager merge, on ONNX Runtime, for any shape."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from onnx import TensorProto, helper

from d3tom_export.errors import D3tomError
from d3tom_export.merging.merge import merge_tokens
from d3tom_export.plugins.merge_op import DOMAIN, OP_TYPE, common_rows, merge_function
from d3tom_export.stages.export import OPSET
from tests.merging.test_merge import merges
from tests.plugins.engines import DEPTH, WIDTH, merge_model


def _model(dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(OP_TYPE, ["hidden", "normed", "kept"], ["merged"], domain=DOMAIN)],
        "merge",
        [
            helper.make_tensor_value_info("hidden", dtype, ["B", "V", "W"]),
            helper.make_tensor_value_info("normed", dtype, ["B", "V", "D"]),
            helper.make_tensor_value_info("kept", TensorProto.INT64, ["B", "K"]),
        ],
        [helper.make_tensor_value_info("merged", dtype, ["B", "K", "W"])],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[merge_function(OPSET)], ir_version=10)


@cache
def _session(dtype: int = TensorProto.FLOAT) -> ort.InferenceSession:
    return ort.InferenceSession(_model(dtype).SerializeToString(), providers=["CPUExecutionProvider"])


def test_the_checker_accepts_the_operator_with_its_body() -> None:
    onnx.checker.check_model(_model(), full_check=True)


def test_every_row_input_is_summed_by_the_one_search() -> None:
    model = onnx.load_from_string(merge_model("float32", None, further=(5,)))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.functions[0].node].count("ArgMax") == 1
    rng = np.random.default_rng(3)
    hidden, second = (rng.normal(size=(2, 30, width)).astype(np.float32) for width in (WIDTH, 5))
    normed = rng.normal(size=(2, 30, DEPTH)).astype(np.float32)
    kept = np.array([[1, 4, 9, 29], [0, 1, 2, 3]])
    shared = {"normed": normed, "kept": kept}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    both = session.run(None, {"hidden": hidden, "hidden_2": second} | shared)
    for rows, merged in zip((hidden, second), both, strict=True):
        # Bit for bit what a node of its own gives.
        (alone,) = _session().run(None, {"hidden": rows} | shared)
        np.testing.assert_array_equal(merged, alone)


def test_nodes_of_one_graph_take_equally_many() -> None:
    assert common_rows([2, 2]) == 2
    with pytest.raises(D3tomError, match="equally many row inputs; found nodes with 1, 2"):
        common_rows([2, 1, 2])
    with pytest.raises(D3tomError, match="found 9"):
        merge_function(OPSET, 9)


def test_the_body_keeps_to_ops_that_tensorrt_takes() -> None:
    nodes = merge_function(OPSET).node
    assert not {node.op_type for node in nodes} & {"NonZero", "OneHot", "Compress", "Unique", "ScatterND", "Loop", "If"}
    (scatter,) = (node for node in nodes if node.op_type == "ScatterElements")
    assert [attribute.name for attribute in scatter.attribute] == ["axis"]  # no reduction


@given(merges())
@settings(deadline=None)
def test_body_is_the_eager_merge(case: tuple[torch.Tensor, ...]) -> None:
    hidden, normed, kept = case
    feeds = {"hidden": hidden.numpy(), "normed": normed.numpy(), "kept": kept.numpy()}
    (merged,) = _session().run(None, feeds)
    np.testing.assert_allclose(merged, merge_tokens(*case).numpy(), atol=1e-4)


@pytest.mark.parametrize(("visual", "keep", "width"), [(1008, 100, 64), (1008, 1, 16), (320, 320, 32)])
def test_body_at_real_token_counts(visual: int, keep: int, width: int) -> None:
    rng = np.random.default_rng(visual + keep)
    hidden, normed = rng.normal(size=(2, 1, visual, width)).astype(np.float32)
    kept = np.sort(rng.permutation(visual)[:keep])[None]
    (merged,) = _session().run(None, {"hidden": hidden, "normed": normed, "kept": kept})
    expected = merge_tokens(torch.from_numpy(hidden), torch.from_numpy(normed), torch.from_numpy(kept))
    np.testing.assert_allclose(merged, expected.numpy(), atol=1e-3)


def test_half_precision_sums_in_float32() -> None:
    hidden = np.full((1, 3000, 1), 1.0, dtype=np.float16)
    normed = np.ones((1, 3000, 1), dtype=np.float16)
    (merged,) = _session(TensorProto.FLOAT16).run(
        None, {"hidden": hidden, "normed": normed, "kept": np.zeros((1, 1), dtype=np.int64)}
    )
    assert merged.dtype == np.float16
    # A float16 running sum of ones would stick at 2048.
    assert merged.item() == 3000
