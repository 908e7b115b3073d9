"""Both sides of products in fp8: scales that samples give, parity on ONNX Runtime, and an engine with fp8 kernels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from d3tom_export.bundle.folder import load_bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.cli.quantize_loss import rounded_by
from d3tom_export.config import GenerationConfig
from d3tom_export.engines.record import Target, plan_file
from d3tom_export.export import assemble
from d3tom_export.export.calibrate import calibration_of
from d3tom_export.model.rounding import RoundedLinear
from d3tom_export.pipeline import Reader
from d3tom_export.progress import no_progress
from d3tom_export.prompt.samples import Sample
from d3tom_export.quantize.calibration import Seen
from d3tom_export.quantize.plan import QuantizePlan, QuantizeRequest
from tests.conftest import Invoke, picture


def test_the_scale_holds_twice_the_largest_number() -> None:
    seen = Seen(torch.zeros(2, 2), torch.tensor(7.0))
    assert seen.input_scale * 448 == 14.0
    smallest = Seen(torch.zeros(2, 2), torch.tensor(0.0)).input_scale
    assert smallest > 0
    assert smallest.half().float() == smallest  # engines in fp16 hold it


def test_what_was_seen_is_what_the_model_multiplies(checkpoint_folder: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_folder)
    reader = Reader.from_folder(checkpoint.folder, checkpoint.config)
    samples = [Sample(f"What is number {number}?", picture(60, 40, number), "A square.") for number in range(2)]
    calibration = calibration_of(checkpoint, samples, reader, GenerationConfig(gen_length=8), no_progress)
    transformer, largest = load_model(checkpoint).transformer, dict[str, float]()

    def note(name: str, x: torch.Tensor) -> None:
        largest[name] = max(largest.get(name, 0.0), x.abs().max().item())

    for name, module in transformer.blocks[0].named_children():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
    for rows in calibration._rows:
        transformer.blocks[0](rows, transformer.compact_rotary(rows))
    found = dict[str, float]()

    def quantize(name: str, weight: torch.Tensor, seen: Seen) -> torch.Tensor | None:
        found[name] = seen.largest.item()
        return None

    calibration.quantize_layer(quantize)
    assert found == pytest.approx(largest)
    assert found["q_proj"] == found["k_proj"] == found["v_proj"]


@pytest.fixture(scope="module")
def bundle_folder(checkpoint_folder: Path, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fp8") / "bundle"
    built = invoke(
        "build", "--model", checkpoint_folder, "--layer", 1, "--ratio", 0.7, "--kv-cache", "both", "--output", output,
        "--quantize", "fp8", "--quantize-activations", "--quantize-samples", 2, "--self-check", 1,
    )  # fmt: skip
    assert built.exit_code == 0, built.output
    assert "what 28 of them are multiplied with too" in built.output
    assert "all kept sets are PyTorch's" in built.output
    told = " ".join(built.output.split())
    assert "rounded by 2 made-up prompts, the scales of activations among them" in told  # it has no questions
    return output


@pytest.mark.slow
def test_graphs_and_oracle_round_the_same_inputs(bundle_folder: Path) -> None:
    bundle = load_bundle(bundle_folder)
    assert bundle.manifest.rounds_inputs
    graph = onnx.load(bundle_folder / stage_file("front"), load_external_data=False).graph
    ops = [node.op_type for node in graph.node]
    # One layer: what q, k and v share is rounded once, and so is what ff and up do.
    assert ops.count("QuantizeLinear") == 4
    assert ops.count("DequantizeLinear") == 4 + 7
    model = load_model(open_checkpoint(bundle_folder, vocab_rows=bundle.manifest.vocab_rows))
    rounding = [name for name, module in model.named_modules() if isinstance(module, RoundedLinear)]
    assert len(rounding) == 7 * bundle.config.language.n_layers
    assert all(".blocks." in name for name in rounding)


@pytest.mark.slow
def test_the_loss_names_samples_that_weights_were_rounded_by(
    bundle_folder: Path, checkpoint_folder: Path, invoke: Invoke
) -> None:
    assert rounded_by(bundle_folder) == 2
    asked = ("validate", bundle_folder, "--quantization-loss", "--model", checkpoint_folder, "--samples")
    told = invoke(*asked, 3)
    assert told.exit_code == 0, told.output
    assert "the first 2 of the samples asked" in told.output


def test_samples_that_are_fewer_or_made_up_are_told(checkpoint_folder: Path, tmp_path: Path) -> None:
    few, request = bundled_model(), QuantizeRequest("int4", samples=99)
    own, sample = open_checkpoint(few), Sample("What is it?", None)
    (told,) = assemble._about(own, [sample] * 3, request, made_up=False)
    assert re.search(r"by 3 samples, all that .*samples\.zip has; 99 were asked for", told)
    assert not list(assemble._about(own, [sample] * 99, request, made_up=False))
    strange = open_checkpoint(checkpoint_folder)
    assert "99 made-up prompts, which" in next(assemble._about(strange, [sample] * 99, request, made_up=False))
    assert not list(assemble._about(strange, [sample], request, made_up=True))  # weights that mean nothing


def test_what_a_config_says_of_samples_is_read(tmp_path: Path) -> None:
    for raw, expected in (
        ({}, 0),
        ({"quantization_config": None}, 0),
        ({"quantization_config": {"samples": "many"}}, 0),
        (QuantizePlan("int4").marks(), 0),
        (QuantizePlan("int4").marks(16), 16),
    ):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert rounded_by(tmp_path) == expected


@pytest.mark.slow
def test_answers_are_pytorchs_that_rounds_too(bundle_folder: Path, checkpoint_folder: Path, invoke: Invoke) -> None:
    validated = invoke("validate", bundle_folder, "--samples", 2, "--json", "-")
    assert validated.exit_code == 0, validated.output
    report = json.loads(validated.stdout)
    typical = [bound for bound in report["bounds"] if bound["name"] == "logits, typical"]
    assert typical
    for bound in typical:
        # Beside it a model that does not round is far off: the bound tells one from the other.
        assert bound["found"] < 0.2 * bound["resolved"], bound
    refused = invoke("validate", bundle_folder, "--layers")
    assert refused.exit_code == 2, refused.output
    assert "round their inputs to float8" in refused.output


@pytest.mark.slow
def test_an_engine_multiplies_codes(bundle_folder: Path, invoke: Invoke) -> None:
    built = invoke(
        "build", "--bundle", bundle_folder, "--engine", "tensorrt-rtx", "--sm", 89, "--precision", "fp16",
        "--merge-op", "onnx",
    )  # fmt: skip
    assert built.exit_code == 0, built.output
    folder = bundle_folder / Target("tensorrt-rtx", (89,), "fp16").folder
    for key in ("front", "back", "cached_back"):
        plan = plan_file(folder, key).read_bytes()
        assert b"type=fp8_e4m3" in plan
        products = re.findall(rb'fully_connected=\{ name=.*?layers="([^"]*)"', plan, re.DOTALL)
        fused = [product.count(b"DequantizeLinear") for product in products if b"DequantizeLinear" in product]
        # Each takes in what stood before it on both of its sides; q, k and v may be one, and ff and up.
        assert min(fused) >= 2, key
        assert {2, 3} <= set(fused), key
