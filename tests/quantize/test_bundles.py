"""Bundles with quantized weights: what is quantized and what is not, and parity with the numbers they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.checkpoint.folder import Checkpoint, open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.checkpoint.stored import stored_tensors
from d3tom_export.config import LOOPS, QUANT_METHOD, GenerationConfig, MergeConfig
from d3tom_export.engines.build import EngineOptions, build_engines, check_weights
from d3tom_export.engines.record import Target, plan_file
from d3tom_export.engines.shapes import default_shapes
from d3tom_export.errors import D3tomError
from d3tom_export.parity.validate import validate_backends
from d3tom_export.pipeline import Reader
from d3tom_export.prompt.samples import Sample
from d3tom_export.quantize.plan import QuantizeRequest, plan_of
from tests.conftest import BuildBundle, Invoke, picture

FORMATS = (
    QuantizeRequest("int4"),
    *(
        pytest.param(request, marks=pytest.mark.slow)
        for request in (
            QuantizeRequest("int4", asymmetric=True),
            QuantizeRequest("int8"),
            QuantizeRequest("fp8"),
            QuantizeRequest("nvfp4"),
        )
    ),
)
MERGE = MergeConfig(layer=1, ratio=0.7)
LANGUAGE_PRODUCTS = 7


@pytest.fixture(scope="session", params=FORMATS)
def quantized(request: pytest.FixtureRequest, build_bundle: BuildBundle) -> Bundle:
    return build_bundle(MERGE, LOOPS, quantize=request.param)


def opened(bundle: Bundle) -> Checkpoint:
    return open_checkpoint(bundle.folder, vocab_rows=bundle.manifest.vocab_rows)


def graph(bundle: Bundle, key: str) -> ModelProto:
    return onnx.load(bundle.folder / stage_file(key), load_external_data=False)


def test_the_products_of_the_blocks_are_quantized_and_nothing_else(quantized: Bundle, checkpoint_folder: Path) -> None:
    before, after = open_checkpoint(checkpoint_folder), opened(quantized)
    layers = before.config.language.n_layers
    assert len(after.quantized) == LANGUAGE_PRODUCTS * layers
    assert all(name.startswith("model.transformer.blocks.") for name in after.quantized)
    assert after.quantized.keys() | after.tensors.keys() >= before.tensors.keys() - {
        name for name in before.tensors if "post_layernorm" in name
    }
    for name in after.tensors:
        ((_, mine),), ((_, other),) = (list(each.read([name])) for each in (after, before))
        assert torch.equal(mine, other)
    names = list(after.quantized)
    for (name, mine), (_, other) in zip(sorted(after.read(names)), sorted(before.read(names)), strict=True):
        assert 0 < (mine - other).norm() / other.norm() < 0.15, name
    assert json.loads((quantized.folder / "config.json").read_text())["quantization_config"] == {
        "quant_method": QUANT_METHOD,
        "format": next(iter(after.quantized.values())).format,
    }


def test_graphs_read_the_few_bits(quantized: Bundle) -> None:
    for key, layers in (("front", 1), ("merge", 1), ("back", 2), ("prefill", 4)):
        model = graph(quantized, key)
        makers = {output: node for node in model.graph.node for output in node.output}
        products = [
            makers[node.input[1]].op_type
            for node in model.graph.node
            if node.op_type == "MatMul" and node.input[1] in makers
        ]
        # With a cache the last layer ends at its keys and values.
        assert products.count("DequantizeLinear") == LANGUAGE_PRODUCTS * layers - (5 if key == "prefill" else 0)
        stored = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
        assert not [name for name in stored if name.endswith(("_proj.weight", "attn_out.weight"))]
        assert stored == set(quantized.manifest.stage_weights[key])
        assert quantized.manifest.opset == next(entry.version for entry in model.opset_import if not entry.domain)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("tuned", [True, False])
def test_answers_are_those_of_the_numbers_it_stands_for(quantized: Bundle, loop: str, tuned: bool) -> None:
    checkpoint = opened(quantized)
    if not tuned and next(iter(checkpoint.quantized.values())).format == "nvfp4":
        with pytest.raises(D3tomError, match="hold weights in nvfp4"):
            OnnxRuntimeBackend(quantized, loop, device="cpu", tuned=False)  # type: ignore[arg-type]
        return
    model = load_model(checkpoint)
    oracle = PyTorchBackend(model, MERGE, kv_cache=loop == "cached")
    backend = OnnxRuntimeBackend(quantized, loop, device="cpu", tuned=tuned)  # type: ignore[arg-type]
    reader = Reader.from_folder(quantized.folder, quantized.config)
    samples = [Sample("What is it?", picture(60, 40, 1)), Sample("And this?", picture(40, 90, 2))]
    generation = GenerationConfig(gen_length=8)
    report = validate_backends([(oracle, backend)], quantized.config, reader, samples, generation, MERGE)
    assert report.passed, report


def test_the_head_and_the_tower_are_quantized_where_that_is_asked_for(checkpoint_folder: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_folder)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if "post_layernorm" not in name}
    usual, all_of_it = (plan_of(shapes, QuantizeRequest("int8", head=more, tower=more)) for more in (False, True))
    more = all_of_it.blocks.keys() - usual.blocks.keys()
    assert "model.transformer.ff_out.weight" in more
    assert {name.split(".")[1] for name in more} == {"transformer", "vision_tower", "mm_projector"}
    assert "embedding table" in all_of_it.describe()
    assert not any(name.endswith((".bias", "norm.weight", "position_embedding.weight")) for name in all_of_it.blocks)


def test_a_block_that_cannot_be_is_refused(invoke: Invoke, checkpoint_folder: Path, tmp_path: Path) -> None:
    for options, says in (
        (("--quantize", "int8", "--quantize-block", 64), "A block is chosen for int4 alone"),
        (("--quantize", "int4", "--quantize-block", 48), "A block of 48 cannot be"),
        (("--quantize-head",), "go with --quantize"),
        (("--quantize-activations",), "go with --quantize"),
        (("--quantize", "fp8", "--quantize-asymmetric"), "Zero points are for int4 alone"),
        (
            ("--quantize", "int4", "--quantize-asymmetric", "--engine", "tensorrt-rtx", "--sm", 89),
            "TensorRT takes no zero points",
        ),
        (("--quantize", "int8", "--quantize-activations", "--quantize-samples", 1), "Activations are rounded to fp8"),
        (("--quantize", "fp8", "--quantize-activations"), "Say how many with --quantize-samples"),
        (("--quantize", "int4", "--precision", "int8"), "Take one of them"),
        (("--quantize", "int4", "--weights", "float16"), "--weights float16 does not go with --quantize"),
    ):
        refused = invoke("build", "--model", checkpoint_folder, "--layer", 1, *options, "--output", tmp_path / "none")
        assert refused.exit_code == 2, refused.output
        assert says in refused.output
        assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_zero_points_are_not_for_engines(build_bundle: BuildBundle) -> None:
    bundle = build_bundle(MERGE, ("uncached",), quantize=QuantizeRequest("int4", asymmetric=True))
    options = EngineOptions(default_shapes(bundle.config, bundle.manifest.generation), merge_op="onnx")
    with pytest.raises(D3tomError, match="TensorRT takes no zero points"):
        build_engines(bundle, [Target("tensorrt-rtx", (89,), "fp16")], options)


ENGINES = [
    ("int4", 89), ("int4", 120), ("int8", 80), ("int8", 89), ("fp8", 89), ("fp8", 120), ("nvfp4", 120),
]  # fmt: skip


KINDS = {"int4": b"int4", "int8": b"int8", "fp8": b"fp8_e4m3", "nvfp4": b"fp4_e2m1"}
"""What a plan calls them."""


@pytest.mark.slow
@pytest.mark.parametrize(("form", "sm"), ENGINES)
def test_engines_hold_the_few_bits(form: str, sm: int, build_bundle: BuildBundle, tmp_path: Path) -> None:
    """Real ones of TensorRT-RTX: each stage with products has constants of the format, and more than without it."""
    request = QuantizeRequest(form)  # type: ignore[arg-type]
    target = Target("tensorrt-rtx", (sm,), "fp16")
    found = []
    for number, each in enumerate((None, request)):
        bundle = build_bundle(MERGE, LOOPS, quantize=each)
        folder = Path(shutil.copytree(bundle.folder, tmp_path / str(number)))
        copied = load_bundle(folder)
        shapes = default_shapes(copied.config, copied.manifest.generation)
        build_engines(copied, [target], EngineOptions(shapes, merge_op="onnx"))
        plans = [plan_file(folder / target.folder, key).read_bytes() for key in ("front", "back", "cached_back")]
        found.append([plan.count(b"type=" + KINDS[form]) for plan in plans])
    assert all(few > whole for whole, few in zip(*found, strict=True)), found


@pytest.mark.parametrize(("form", "sm"), [("int4", 75), ("fp8", 86), ("nvfp4", 89)])
def test_gpus_without_a_format_are_named(form: str, sm: int) -> None:
    targets = Target("tensorrt-rtx", (sm, 120), "fp16")
    with pytest.raises(D3tomError, match=f"{form} from SM.*SM{sm} were asked for"):
        check_weights(targets, {"F32"}, {form})  # type: ignore[arg-type]
    check_weights(Target("tensorrt-rtx", (120,), "fp16"), {"F32"}, {form})  # type: ignore[arg-type]


def test_bfloat16_beside_few_bits_is_left_behind_by_two_builds() -> None:
    target = Target("tensorrt", (75,), "fp16")
    with pytest.raises(D3tomError, match=r"--weights float16 and without --quantize first.*--model and --quantize"):
        check_weights(target, {"BF16"}, {"int8"})
    check_weights(target, {"F16"}, {"int8"})


@pytest.mark.slow
def test_a_bundle_in_float16_is_quantized(checkpoint_folder: Path, invoke: Invoke, tmp_path: Path) -> None:
    usual = ("--layer", 1, "--ratio", 0.7, "--self-check", 0, "--output")
    half, few = tmp_path / "half", tmp_path / "few"
    first = invoke("build", "--model", checkpoint_folder, "--weights", "float16", *usual, half)
    assert first.exit_code == 0, first.output
    second = invoke("build", "--model", half, "--quantize", "int8", *usual, few)
    assert second.exit_code == 0, second.output
    stored = stored_tensors(few)
    assert {tensor.dtype for tensor in stored.values()} == {"F16", "I8", "F32"}
    whole = {tensor.dtype for name, tensor in stored.items() if ".int8" not in name}
    check_weights(Target("tensorrt", (75,), "fp16"), whole, {"int8"})
    assert not list(tmp_path.glob(".*"))  # nor shards that waited
