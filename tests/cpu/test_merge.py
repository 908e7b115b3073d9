"""Sums in sorted blocks against the merge itself: sizes around the block, clusters of any size, several rows."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from d3tom_export.cpu.merge import BLOCK, inline_merges
from d3tom_export.merging.merge import merge_tokens
from d3tom_export.plugins.merge_op import DOMAIN, OP_TYPE, merge_function
from tests.plugins.engines import DEPTH, WIDTH, merge_model


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    value, opsets = onnx.helper.make_tensor_value_info, [("", 23), (DOMAIN, 1)]
    node = onnx.helper.make_node(OP_TYPE, ["hidden", "normed", "kept"], ["merged"], domain=DOMAIN)
    graph = onnx.helper.make_graph(
        [node],
        "merge",
        [value("hidden", 1, ["B", "V", "W"]), value("normed", 1, ["B", "V", "D"]), value("kept", 7, ["B", "K"])],
        [value("merged", 1, ["B", "K", "W"])],
    )
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets]
    proto = onnx.helper.make_model(graph, opset_imports=imports, functions=[merge_function(23)], ir_version=10)
    model = ir.from_proto(proto)
    assert isinstance(model, ir.Model)
    assert inline_merges(model) == 1
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("batch", "rows", "kept"),
    [(1, 1, 1), (1, BLOCK, 3), (2, BLOCK + 1, BLOCK + 1), (3, 5 * BLOCK - 1, 7), (1, 200, 1), (2, 100, 60)],
)
def test_sums_are_those_of_the_merge(session: ort.InferenceSession, batch: int, rows: int, kept: int) -> None:
    rng = np.random.default_rng(rows)
    hidden = rng.normal(size=(batch, rows, 6)).astype(np.float32)
    normed = rng.normal(size=(batch, rows, 5)).astype(np.float32)
    chosen = np.stack([np.sort(rng.choice(rows, kept, replace=False)) for _ in range(batch)])
    (merged,) = session.run(None, {"hidden": hidden, "normed": normed, "kept": chosen})
    expected = merge_tokens(torch.from_numpy(hidden), torch.from_numpy(normed), torch.from_numpy(chosen))
    np.testing.assert_allclose(merged, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_several_row_inputs_are_those_of_nodes_of_their_own(session: ort.InferenceSession) -> None:
    model = ir.from_proto(onnx.load_from_string(merge_model("float32", None, further=(5,))))
    assert isinstance(model, ir.Model)
    model.graph.opset_imports[""] = 23
    assert inline_merges(model) == 1
    proto = ir.to_proto(model)
    assert [node.op_type for node in proto.graph.node].count("ArgMax") == 1
    both = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(3)
    hidden, second = (rng.normal(size=(2, 50, width)).astype(np.float32) for width in (WIDTH, 5))
    shared = {"normed": rng.normal(size=(2, 50, DEPTH)).astype(np.float32), "kept": np.array([[1, 4, 49], [0, 1, 20]])}
    merged = both.run(None, {"hidden": hidden, "hidden_2": second} | shared)
    for rows, found in zip((hidden, second), merged, strict=True):
        np.testing.assert_array_equal(found, session.run(None, {"hidden": rows} | shared)[0])


def test_a_kept_token_keeps_itself_beside_an_identical_twin(session: ort.InferenceSession) -> None:
    rows = np.ones((1, 4, 2), dtype=np.float32)
    (merged,) = session.run(None, {"hidden": rows, "normed": rows, "kept": np.array([[1, 3]])})
    assert merged.tolist() == [[[3.0, 3.0], [1.0, 1.0]]]


@pytest.mark.parametrize("width", [64, 512, 4096])
def test_likeness_is_decided_to_float32s_precision(session: ort.InferenceSession, width: int) -> None:
    """Rows between two kept ones of any length, nearer to one of them by 6e-7 of cosine similarity."""
    rng = np.random.default_rng(width)
    pairs = 100
    one, other = (rng.normal(size=(pairs, width)) for _ in range(2))
    one, other = (ends / np.linalg.norm(ends, axis=-1, keepdims=True) for ends in (one, other))
    middle = one * (1 + 1e-6) + other  # sqrt(2) times nearer
    rows = np.concatenate([one, other, middle]) * rng.uniform(1, 50, size=(3 * pairs, 1))
    unit = rows.astype(np.float32).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    cosine = np.einsum("rw,krw->rk", unit[2 * pairs :], unit[: 2 * pairs].reshape(2, pairs, width))
    clear = np.abs(cosine[:, 0] - cosine[:, 1]) > 5e-7  # the rows' own rounding comes first
    assert clear.sum() > pairs / 2
    hidden = np.zeros((1, 3 * pairs, 1), np.float32)
    for pair in np.flatnonzero(clear):
        hidden[0, 2 * pairs + pair] = 1
        (merged,) = session.run(
            None, {"hidden": hidden, "normed": rows[None].astype(np.float32), "kept": np.arange(2 * pairs)[None]}
        )
        assert merged[0, pair if cosine[pair, 0] > cosine[pair, 1] else pairs + pair] == 1
        hidden[:] = 0
