"""Tuned graphs: what is in them, that they say what the standard ones say, and that a missing pattern stops a build."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.config import MergeConfig
from d3tom_export.cpu.place import UNTUNED, tuned_graph
from d3tom_export.cpu.tune import tune, write_tuned
from d3tom_export.errors import D3tomError
from tests.conftest import BuildBundle

SIZES = {"B": 3, "P": 57, "G": 9, "V": 40, "K": 7, "L": 66, "M": 33, "C": 24}


def _ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph)


def _session(path: Path, bundle: Bundle) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.folder))
    return ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def _inputs(session: ort.InferenceSession) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    given = {
        "visual_positions": np.arange(3, 3 + SIZES["V"]),
        "keep": np.array([SIZES["K"]]),
        "answer_length": np.array([SIZES["G"]]),
    }
    inputs = {}
    for tensor in (*session.get_inputs(), *session.get_overridable_initializers()):
        shape = [SIZES.get(axis, axis) for axis in tensor.shape]
        if tensor.name in given:
            inputs[tensor.name] = given[tensor.name]
        elif tensor.type == "tensor(bool)":
            inputs[tensor.name] = rng.random(shape) < 0.5
        else:
            inputs[tensor.name] = rng.normal(size=shape).astype(np.float32)
    return inputs


def _keys(bundle: Bundle) -> list[str]:
    return [key for key, spec in bundle.manifest.stages.items() if spec.name not in UNTUNED]


def test_every_stage_says_what_the_standard_graph_says(bundle: Bundle) -> None:
    for key in _keys(bundle):
        standard = _session(bundle.folder / stage_file(key), bundle)
        inputs = _inputs(standard)
        names = [output.name for output in standard.get_outputs()]
        tuned = _session(tuned_graph(bundle.folder, "fp32", key), bundle)
        assert [output.name for output in tuned.get_outputs()] == names
        assert [value.name for value in tuned.get_inputs()] == [value.name for value in standard.get_inputs()]
        for name, want, have in zip(names, standard.run(names, inputs), tuned.run(names, inputs), strict=True):
            if want.dtype == np.int64:
                assert np.array_equal(want, have), (key, name)
            np.testing.assert_allclose(want, have, rtol=1e-4, atol=1e-4, err_msg=f"{key} {name}")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("front", {"RMSNormalization": 2, "RotaryEmbedding": 2, "Attention": 1}),
        # Only a search for the nearest takes roots: the norms of kept rows.
        ("merge", {"RMSNormalization": 2, "RotaryEmbedding": 2, "Attention": 1, "D3ToMMerge": 0, "Sqrt": 1}),
        ("back", {"RMSNormalization": 5, "RotaryEmbedding": 4, "Attention": 2, "Softmax": 0}),
        ("prefill", {"RMSNormalization": 7, "RotaryEmbedding": 6, "Attention": 3, "Softmax": 0}),
        ("rotate", {"RotaryEmbedding": 1}),
        ("cached_front", {"RMSNormalization": 2, "RotaryEmbedding": 2, "Attention": 1}),
        ("decide", {"RMSNormalization": 2, "RotaryEmbedding": 2, "TopK": 2, "Softmax": 1}),
        # Sums: two sorts a layer, which keys and values share.
        ("cached_merge", {"RMSNormalization": 2, "RotaryEmbedding": 4, "TopK": 2 + 2 * 2, "D3ToMMerge": 0, "Sqrt": 2}),
        ("cached_back", {"RMSNormalization": 5, "RotaryEmbedding": 4, "Attention": 2, "Softmax": 0}),
    ],
)
def test_what_is_in_a_tuned_graph(bundle: Bundle, key: str, expected: dict[str, int]) -> None:
    ops = _ops(tuned_graph(bundle.folder, "fp32", key))
    assert {name: ops[name] for name in expected} == expected
    assert ops["Sqrt"] == expected.get("Sqrt", 0)
    assert not {"Neg", "Pow"} & set(ops)


def test_a_tuned_graph_stores_no_weight(bundle: Bundle) -> None:
    weights = sum(path.stat().st_size for path in bundle.folder.glob("*.safetensors"))
    for key in _keys(bundle):
        model = ir.load(tuned_graph(bundle.folder, "fp32", key))
        inside = [value for value in model.graph.initializers.values() if value.const_value is not None]
        stored = [v.const_value for v in inside if not isinstance(v.const_value, ir.ExternalTensor)]
        assert sum(tensor.nbytes for tensor in stored if tensor is not None) < weights / 100


def test_a_graph_without_its_patterns_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    spec, language = bundle.manifest.stages["front"], bundle.config.language
    model = ir.load(bundle.folder / "front.onnx")
    for node in model.graph:
        if node.op_type == "Reciprocal":
            node.op_type = "Neg"
    ir.save(model, tmp_path / "front.onnx")
    with pytest.raises(D3tomError, match=r"front cannot be tuned.*norms 0 \(expected 2\)"):
        tune(tmp_path / "front.onnx", spec, language, bundle.manifest.merge, "fp32")


def test_int8_quantizes_every_product_with_a_weight(bundle: Bundle) -> None:
    for key, products in {"front": 7, "back": 15, "prefill": 23, "cached_merge": 7}.items():
        spec, language = bundle.manifest.stages[key], bundle.config.language
        model = tune(bundle.folder / stage_file(key), spec, language, bundle.manifest.merge, "int8")
        ops = Counter(node.op_type for node in model.graph)
        assert ops["MatMulIntegerToFloat"] == products
        # Once for each weight; rows once for queries, keys and values, once for gate and up, and for the two others.
        assert ops["QuantizeLinear"] - products <= 4 * -(-products // 7)


def test_several_merges_of_one_choice(build_bundle: BuildBundle) -> None:
    """Aggregation by the mean merges ones too, onto the same targets."""
    bundle = build_bundle(MergeConfig(2, 0.6, aggregate="mean", positions="original"))
    assert _ops(tuned_graph(bundle.folder, "fp32", "merge"))["ArgMax"] == 1


def test_graphs_that_are_there_are_replaced_and_never_written_into(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    stages = {"back": bundle.manifest.stages["back"]}
    theirs = tmp_path / "theirs.safetensors"
    theirs.write_bytes(b"precious")
    target = tuned_graph(folder, "fp32", "back")
    target.parent.mkdir(parents=True)
    (folder / stage_file("back")).write_bytes((bundle.folder / stage_file("back")).read_bytes())
    for make in (Path.hardlink_to, Path.symlink_to):
        target.unlink(missing_ok=True)
        make(target, theirs)
        write_tuned(folder, stages, bundle.config.language, bundle.manifest.merge)
        assert theirs.read_bytes() == b"precious"
        assert not target.is_symlink()
        assert target.read_bytes() == tuned_graph(bundle.folder, "fp32", "back").read_bytes()
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    other = tmp_path / "elsewhere"
    target.parent.rename(other)
    target.parent.symlink_to(other)
    with pytest.raises(D3tomError, match="is a link that leads out"):
        write_tuned(folder, stages, bundle.config.language, bundle.manifest.merge)
