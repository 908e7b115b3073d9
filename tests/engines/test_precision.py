"""The precision pass: which nodes stay in float32, that the graphs are valid, and that the numbers hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.config import LOOPS
from d3tom_export.engines.graph import engine_graph
from d3tom_export.engines.precision import MERGE_SUMS, lower_precision
from d3tom_export.engines.stages import HOST_TENSORS, engine_stages, engine_tensors
from d3tom_export.stages.contract import StageSpec

F32 = ir.DataType.FLOAT
LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def _lowered(bundle: Bundle, key: str, precision: str) -> ir.Model:
    model = ir.load(bundle.folder / stage_file(key))
    lower_precision(model, bundle.manifest.stages[key], precision)
    return model


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_stage_is_a_valid_graph_with_the_engines_tensors(bundle: Bundle, tmp_path: Path, precision: str) -> None:
    for path in bundle.folder.glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    for key, spec in engine_stages(bundle.manifest.stages, bundle.config, bundle.manifest.merge).items():
        graph = engine_graph(bundle.folder / stage_file(key), spec, precision, "onnx")
        path = tmp_path / f"{key}.onnx"
        path.write_bytes(graph.model)
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load_from_string(graph.model)
        for tensors, values in ((spec.inputs, model.graph.input), (spec.outputs, model.graph.output)):
            for tensor, value in zip(engine_tensors(tensors, precision), values, strict=True):
                dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                assert (value.name, str(dtype)) == (tensor.name, tensor.dtype), key


@pytest.mark.parametrize("key", ["merge", "decide", "cached_merge"])
def test_scores_are_float32_from_the_projections_on(bundle: Bundle, key: str) -> None:
    model = _lowered(bundle, key, "bf16")
    # A low value on the way from a projection to a comparison must be cast up at once, and nothing computed on it.
    comparisons = [node for node in model.graph if node.op_type in ("Greater", "Equal")]
    seen: set[ir.Value] = set()
    waiting = [v for node in comparisons for v in node.inputs if v is not None and v.dtype == F32]
    assert waiting
    products = []
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if value in seen or producer is None:
            continue
        seen.add(value)
        if producer.op_type == "Cast":
            source = producer.inputs[0]
            assert source is not None
            if source.dtype != LOW["bf16"]:
                continue
            origin = source.producer()
            # An input of the stage (a cache), or a projection: moved at most.
            while origin is not None and origin.op_type in ("Reshape", "Transpose", "Split", "Slice"):
                assert origin.inputs[0] is not None
                origin = origin.inputs[0].producer()
            assert origin is None or origin.op_type == "MatMul", origin
            continue
        products += [producer] if producer.op_type == "MatMul" else []
        waiting += [v for v in producer.inputs if v is not None and v.dtype == F32]
    assert len(products) >= 1  # queries times keys
    assert all(node.outputs[0].dtype == F32 for node in products)


def test_products_are_low_and_softmax_norms_and_angles_are_not(bundle: Bundle) -> None:
    for key in bundle.manifest.stages:
        model = _lowered(bundle, key, "bf16")
        products = [node for node in model.graph if node.op_type == "MatMul"]
        wide = [node for node in products if node.outputs[0].dtype == F32]
        assert len(wide) <= 2, key  # the scores' own: keys and, with a cache, the answer's keys
        for node in model.graph:
            if node.op_type in ("Softmax", "ReduceMean", "Pow", "Sqrt", "Cos", "Sin", "ReduceL2", "Exp", "Sigmoid"):
                assert node.outputs[0].dtype == F32, (key, node)
            floats = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None and v.dtype in (F32, LOW["bf16"])}
            assert node.op_type == "Cast" or len(floats) <= 1, (key, node)


def test_the_residual_stream_is_low(bundle: Bundle) -> None:
    """Of the additions of whole rows, two a layer: after attention and after the feed-forward."""
    model = _lowered(bundle, "back", "fp16")
    layers = bundle.config.language.n_layers - bundle.manifest.merge.layer - 1
    low = [node for node in model.graph if node.op_type == "Add" and node.outputs[0].dtype == LOW["fp16"]]
    assert len(low) == 2 * layers


def test_constants_that_would_lose_digits_keep_their_node_in_float32() -> None:
    spec = StageSpec("toy", (), ())
    for factor, expected in ((0.1, F32), (0.5, LOW["fp16"])):
        model = ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["": 20]> toy (float[n] x) => (float[n] y)'
            f"<float f = {{{factor}}}> {{ y = Mul (x, f) }}"
        )
        from d3tom_export.engines.precision import _Pass

        one = _Pass(model, spec, "fp16")
        model.graph[0].outputs[0].dtype = F32
        reason = one._decide(model.graph[0])
        assert (F32 if reason else LOW["fp16"]) == expected


def test_the_report_names_the_reasons(bundle: Bundle) -> None:
    model = ir.load(bundle.folder / "merge.onnx")
    report = lower_precision(model, bundle.manifest.stages["merge"], "fp16")
    assert report.low > 0
    assert {"norm or other statistic", "softmax", "scores of the visual tokens", MERGE_SUMS} <= set(report.float32)
    assert "float32: " in str(report)
    assert report.to_json()["precision"] == "fp16"


def test_host_tensors_are_those_of_the_contract(bundle: Bundle) -> None:
    names = {t.name for spec in bundle.manifest.stages.values() for t in (*spec.inputs, *spec.outputs)}
    assert names >= HOST_TENSORS - {"selection_scores", "likeliest"}  # of other merging, and of another family


@pytest.mark.parametrize("loop", LOOPS)
def test_an_fp16_stage_departs_from_float32_by_fp16s_rounding_only(
    half_bundle: Bundle, tiny_bundle: Bundle, loop: str
) -> None:
    """Each stage alone, same inputs in both precisions: relative error of its float outputs below 1 %."""
    sizes = {"B": 1, "P": 70, "G": 48, "L": 118, "V": 50, "K": 11, "M": 47, "C": 31, "S": 9, "views": 2}
    random = np.random.default_rng(0)
    for key, spec in tiny_bundle.manifest.stages.items():
        if spec.loop not in (None, loop):
            continue
        feeds = {}
        for tensor in spec.inputs:
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes]
            feeds[tensor.name] = {
                "token_ids": lambda shape=shape: random.integers(0, 60, shape),
                "deciders": lambda shape=shape: random.random(shape) < 0.3,
                "visual_positions": lambda: np.arange(10, 60),
                "keep": lambda: np.array([sizes["K"]]),
                "answer_length": lambda: np.array([sizes["G"]]),
            }.get(tensor.name, lambda shape=shape: random.standard_normal(shape).astype(np.float32))()
        expected = _run(tiny_bundle, key, feeds)
        found = _run(half_bundle, key, feeds)
        if "kept" in expected and not np.array_equal(expected["kept"], found["kept"]):
            # On random rows scores lie close: a handful may change places, the rest must stay.
            assert len(np.intersect1d(expected["kept"], found["kept"])) >= sizes["K"] - 2
            continue
        for name, value in expected.items():
            if value.dtype == np.float32 and name not in ("confidence", "doubt"):
                error = np.abs(found[name].astype(np.float32) - value).max() / np.abs(value).max()
                assert error < 0.01, (key, name, error)


def _run(bundle: Bundle, key: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(bundle.folder / stage_file(key)), providers=["CPUExecutionProvider"])
    dtypes = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    typed = {i.name: feeds[i.name].astype(dtypes.get(i.type, feeds[i.name].dtype)) for i in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, typed), strict=True))
