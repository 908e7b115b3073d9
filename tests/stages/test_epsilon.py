"""The epsilon that keeps a pruned head's zeros from becoming NaN in the cached merge: in every graph, and felt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.cpu.tune import tune
from d3tom_export.engines.graph import engine_graph
from d3tom_export.engines.stages import engine_stages
from d3tom_export.loop.backend import Prompt
from d3tom_export.model.llada import RMSNorm
from d3tom_export.pipeline import run_loop
from d3tom_export.stages.cached import _ENLARGED, EPSILON
from d3tom_export.stages.contract import StageSpec, TensorSpec
from d3tom_export.stages.export import export_stage

MERGES = 4
"""Keys and values of the two layers behind l* = 1."""


def _standard(bundle: Bundle, _: str) -> onnx.ModelProto:
    return onnx.load(bundle.folder / "cached_merge.onnx", load_external_data=False)


def _tuned(bundle: Bundle, precision: str) -> onnx.ModelProto:
    import onnx_ir as ir

    stage, manifest = bundle.manifest.stages["cached_merge"], bundle.manifest
    path = bundle.folder / "cached_merge.onnx"
    return ir.to_proto(tune(path, stage, bundle.config.language, manifest.merge, precision))  # type: ignore[arg-type]


def _engine(bundle: Bundle, precision: str, merge_op: str = "onnx") -> onnx.ModelProto:
    stage = engine_stages(bundle.manifest.stages, bundle.config, bundle.manifest.merge)["cached_merge"]
    path = bundle.folder / "cached_merge.onnx"
    return onnx.load_from_string(engine_graph(path, stage, precision, merge_op).model)  # type: ignore[arg-type]


GRAPHS: list[tuple[Callable[..., onnx.ModelProto], str]] = [
    (_standard, ""), (_tuned, "fp32"), (_tuned, "int8"),
    (_engine, "fp32"), (_engine, "fp16"), (_engine, "bf16"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "precision"), GRAPHS, ids=lambda value: getattr(value, "__name__", value))
def test_every_graph_of_the_cached_merge_adds_it_in_float32(
    bundle: Bundle, make: Callable[..., onnx.ModelProto], precision: str
) -> None:
    graph = make(bundle, precision).graph
    epsilon = np.float32(EPSILON * _ENLARGED)
    constants = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL
    }
    sums = [
        node
        for node in graph.node
        if node.op_type == "Add"
        and any(name in constants and constants[name].size == 1 and constants[name] == epsilon for name in node.input)
    ]
    assert len(sums) == MERGES
    makers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in sums:
        # From the norm to the quotient no cast: 1e-8 is 0 in float16, and the quotient infinite.
        held = next(name for name in node.input if name in constants)
        assert constants[held].dtype == np.float32
        enlarged = makers[next(name for name in node.input if name not in constants)]
        assert enlarged.op_type == "Mul"
        assert any(name in constants and constants[name] == np.float32(_ENLARGED) for name in enlarged.input)
        (quotient,) = readers[node.output[0]]
        assert quotient.op_type == "Div"
        (choice,) = readers[quotient.output[0]]
        assert choice.op_type == "Where"
        (product,) = readers[choice.output[0]]
        assert product.op_type == "Mul"


def test_the_enlarged_quotient_is_the_released_one_bit_for_bit() -> None:
    """Norms from the smallest float32 to 1e30, and where a clamp would differ: up to 1e-8 * 2**24."""
    rng = np.random.default_rng(0)
    norms = np.concatenate(
        [[0.0, 1e-45, 1e-38, 1e-8], 10.0 ** rng.uniform(-44, 30, 100_000), rng.uniform(0, 0.3, 100_000)]
    )
    norms = torch.from_numpy(norms.astype(np.float32))
    means = torch.from_numpy((10.0 ** rng.uniform(-6, 6, len(norms))).astype(np.float32))
    released = means / (norms + 1e-8)
    assert torch.equal(means * _ENLARGED / (norms * _ENLARGED + EPSILON * _ENLARGED), released)
    clamped = means / norms.clamp(min=1e-8)
    assert not torch.equal(clamped, released)  # what a clamp would give is something else


@pytest.fixture(scope="module")
def pruned(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """``bundle`` whose first value head is zero in every layer. Its graphs read the weights from these files."""
    folder = tmp_path_factory.mktemp("pruned") / "bundle"
    shutil.copytree(bundle.folder, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(".v_proj.weight"):
                tensor[:8] = 0.0
        path.unlink()  # it may be linked to the checkpoint's own
        before = (bundle.folder / path.name).stat().st_size
        save_file(tensors, path)
        assert path.stat().st_size == before, "the weights moved: the graphs would read others"
    return Bundle(folder, bundle.manifest, bundle.config)


@pytest.mark.parametrize("tuned", [False, True], ids=["standard", "tuned"])
def test_a_value_head_of_zeros_gives_what_pytorch_gives(pruned: Bundle, tuned: bool) -> None:
    checkpoint = open_checkpoint(pruned.folder, vocab_rows=pruned.manifest.vocab_rows)
    merge = MergeConfig(layer=1, ratio=0.7)
    oracle = PyTorchBackend(load_model(checkpoint), merge, kv_cache=True)
    backend = OnnxRuntimeBackend(pruned, "cached", device="cpu", tuned=tuned)
    embeddings = np.random.default_rng(3).normal(size=(1, 41, 32)).astype(np.float32)
    prompt = Prompt(embeddings, np.arange(4, 35))
    runs = [
        list(run_loop(one, prompt, 258, GenerationConfig(gen_length=8), merge, logits=True))
        for one in (oracle, backend)
    ]
    merged = 0
    for expected, found in zip(*runs, strict=True):
        assert np.array_equal(found.tokens, expected.tokens)
        assert found.result.logits is not None
        assert np.isfinite(found.result.logits).all()
        np.testing.assert_allclose(found.result.logits, expected.result.logits, atol=1e-3)
        merged += expected.merged
    assert merged >= 6


def test_a_value_head_of_zeros_stays_zero_in_a_float16_engines_graph(pruned: Bundle) -> None:
    """The stage that an fp16 engine is built from, on ONNX Runtime: zeros in, zeros out, the rest finite."""
    graph = engine_graph(pruned.folder / "cached_merge.onnx", pruned.manifest.stages["cached_merge"], "fp16", "onnx")
    path = pruned.folder / "half.onnx"
    path.write_bytes(graph.model)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng, sizes = np.random.default_rng(1), {"B": 1, "P": 41, "G": 8}
    feed = {}
    for value in session.get_inputs():
        shape = [sizes.get(axis, axis) for axis in value.shape]
        feed[value.name] = rng.normal(size=shape).astype(np.float16) if "float16" in value.type else None
        if value.name.startswith("values_"):
            feed[value.name][:, :, 0] = 0
    feed |= {
        "deciders": np.ones((1, 8), dtype=bool), "visual_positions": np.arange(4, 35), "keep": np.array([9]),
    }  # fmt: skip
    outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))
    for name, rows in outputs.items():
        assert np.isfinite(rows).all(), name
    for layer in (2, 3):
        values = outputs[f"merged_values_{layer}"]
        assert values.shape == (1, 2, 19, 8)
        assert not values[:, 0].any()
        assert values[:, 1].any()


class _Norm(torch.nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(16, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@pytest.mark.parametrize("eps", [1e-8, 1e-9, 1e-12])
def test_an_epsilon_of_any_size_survives_export(tmp_path: Path, eps: float) -> None:
    """The optimiser takes x + 1e-8 for x + 0: a norm's own epsilon is no safer than the cache's."""
    save_file({"weight": torch.ones(16)}, tmp_path / "model.safetensors")
    from d3tom_export.checkpoint.stored import stored_tensors

    module = _Norm(eps).eval().requires_grad_(False)
    spec = TensorSpec("x", "float32", ("B", "S", 16))
    stage = StageSpec("norm", (spec,), (TensorSpec("y", "float32", ("B", "S", 16)),))
    weights = {id(module.norm.weight): ("weight", stored_tensors(tmp_path)["weight"])}
    export_stage(stage, module, tmp_path / "norm.onnx", weights)
    session = ort.InferenceSession(tmp_path / "norm.onnx", providers=["CPUExecutionProvider"])
    x = np.zeros((1, 2, 16), dtype=np.float32)
    x[0, 1] = 1e-7
    (y,) = session.run(None, {"x": x})
    np.testing.assert_allclose(y, module(torch.from_numpy(x)).numpy(), rtol=1e-5)
