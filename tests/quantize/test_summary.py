"""What is told of weights in few bits: format, size, and what stayed as it was, by reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.config import LOOPS, MergeConfig
from d3tom_export.quantize.plan import QuantizeRequest
from d3tom_export.quantize.summary import summary_of
from d3tom_export.report.gather import built_with
from tests.conftest import BuildBundle, Invoke

MERGE = MergeConfig(layer=1, ratio=0.7)


@pytest.fixture(scope="module")
def bundle(build_bundle: BuildBundle) -> Bundle:
    return build_bundle(MERGE, LOOPS, quantize=QuantizeRequest("int4"))


def stored_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def test_inspect_tells_format_size_and_what_was_left(bundle: Bundle, invoke: Invoke) -> None:
    told = invoke("inspect", bundle.folder, "--json", "-")
    assert told.exit_code == 0, told.output
    weights = json.loads(told.stdout)["quantization"]
    layers = bundle.config.language.n_layers
    assert weights["format"] == "int4"
    assert weights["weights"] == 7 * layers
    assert not weights["zero_points"]
    assert weights["rounded_inputs"] == 0
    # Four bits, and a float32 scale for 32 inputs or, of the 48 of the last product, 16.
    q, kv, ff = 32 * 32, 16 * 32, 48 * 32
    numbers = 2 * q + 2 * kv + 3 * ff
    assert weights["block"] == 32
    assert weights["bits"] == pytest.approx(4 + 32 * ((numbers - ff) / 32 + ff / 16) / numbers)
    assert weights["bytes"] == layers * numbers * weights["bits"] / 8
    assert weights["bytes"] + weights["whole_bytes"] == stored_bytes(bundle.folder)
    assert sum(weights["whole"].values()) == len(
        open_checkpoint(bundle.folder, vocab_rows=bundle.manifest.vocab_rows).tensors
    )
    assert any("embedding table" in reason for reason in weights["whole"])
    lines = invoke("inspect", bundle.folder).output
    assert f"weights    {7 * layers} in int4, a scale for 32 inputs: " in lines
    assert "left whole" in lines
    assert "language head" in lines


def test_of_whole_weights_nothing_is_told(build_bundle: BuildBundle, checkpoint_folder: Path, invoke: Invoke) -> None:
    whole = build_bundle(MERGE, LOOPS)
    assert json.loads(invoke("inspect", whole.folder, "--json", "-").stdout)["quantization"] is None
    assert "left whole" not in invoke("inspect", whole.folder).output
    assert summary_of(open_checkpoint(checkpoint_folder)) is None


def test_a_report_names_the_format(bundle: Bundle, build_bundle: BuildBundle) -> None:
    for each, told in ((bundle, ", those of products in int4"), (build_bundle(MERGE, LOOPS), "")):
        backend = OnnxRuntimeBackend(each, device="cpu")
        groups = dict(built_with(each, backend, each.manifest.generation, MERGE))
        assert dict(groups["Model"])["weights"] == f"of a checkpoint{told}"


@pytest.mark.slow
def test_bench_names_the_format(bundle: Bundle, invoke: Invoke) -> None:
    told = invoke("bench", bundle.folder, "--rounds", 1, "--no-memory", "--commit", "plan")
    assert told.exit_code == 0, told.output
    assert "(fp32, weights in int4)" in told.output
    assert "weights: 28 in int4, a scale for 32 inputs" in told.output
