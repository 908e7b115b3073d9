"""Weights in nvfp4: the CPU runs them by graphs of its own, all else says why it does not, engines are for SM120."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d3tom_export.bundle.folder import load_bundle
from d3tom_export.cpu.place import tuned_file
from d3tom_export.engines.record import Target, plan_file
from tests.conftest import Invoke

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle_folder(checkpoint_folder: Path, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built, with the vision tower, and self-checked on the CPU."""
    output = tmp_path_factory.mktemp("nvfp4") / "bundle"
    built = invoke(
        "build", "--model", checkpoint_folder, "--layer", 1, "--ratio", 0.7, "--output", output,
        "--quantize", "nvfp4", "--quantize-tower", "--self-check", 1,
    )  # fmt: skip
    assert built.exit_code == 0, built.output
    assert "whose weights in nvfp4 ONNX Runtime has no CPU kernels for, were not" in built.output
    return output


def test_the_cpu_runs_graphs_of_its_own(bundle_folder: Path, invoke: Invoke) -> None:
    bundle = load_bundle(bundle_folder)
    assert bundle.manifest.formats == {"nvfp4"}
    # The tower has a graph for the CPU too; the embedding table, which nothing rewrites, has none.
    assert (bundle_folder / tuned_file("fp32", "vision")).is_file()
    assert not (bundle_folder / tuned_file("fp32", "embed")).exists()
    validated = invoke("validate", bundle_folder, "--samples", 1, "--json", "-")
    assert validated.exit_code == 0, validated.output
    report = json.loads(validated.stdout)
    assert report["graphs"] == ["tuned"]
    assert any("no CPU kernels for weights in nvfp4" in reason for reason in report["not_probed"])


@pytest.mark.parametrize("graphs", ["standard", "both"])
def test_standard_graphs_are_refused_with_the_reason(graphs: str, bundle_folder: Path, invoke: Invoke) -> None:
    refused = invoke("validate", bundle_folder, "--graphs", graphs)
    assert refused.exit_code == 2, refused.output
    assert "hold weights in nvfp4, and ONNX Runtime has no CPU kernels" in " ".join(refused.output.split())


def test_a_faulty_stage_is_named_without_the_standard_graphs(bundle_folder: Path, invoke: Invoke) -> None:
    found = invoke("validate", bundle_folder, "--first-bad-stage")
    assert found.exit_code == 0, found.output
    refused = invoke("validate", bundle_folder, "--layers")
    assert refused.exit_code == 2, refused.output
    assert "--first-bad-stage names the stage" in " ".join(refused.output.split())


def test_half_precision_is_for_engines(
    bundle_folder: Path, checkpoint_folder: Path, invoke: Invoke, tmp_path: Path
) -> None:
    later = invoke("build", "--bundle", bundle_folder, "--precision", "fp16")
    assert later.exit_code == 1, later.output
    at_once = invoke(
        "build", "--model", checkpoint_folder, "--layer", 1, "--quantize", "nvfp4", "--precision", "bf16",
        "--output", tmp_path / "none",
    )  # fmt: skip
    assert at_once.exit_code == 2, at_once.output
    for refused in (later, at_once):
        assert "no kernels for weights in nvfp4" in " ".join(refused.output.split())
    assert not (tmp_path / "none").exists()


def test_engines_are_for_gpus_that_have_it(bundle_folder: Path, invoke: Invoke) -> None:
    options = ("--engine", "tensorrt-rtx", "--precision", "fp16", "--merge-op", "onnx")
    refused = invoke("build", "--bundle", bundle_folder, *options, "--sm", 89)
    assert refused.exit_code == 1, refused.output
    assert "nvfp4 from SM100 on" in " ".join(refused.output.split())
    built = invoke("build", "--bundle", bundle_folder, *options, "--sm", 120)
    assert built.exit_code == 0, built.output
    folder = bundle_folder / Target("tensorrt-rtx", (120,), "fp16").folder
    for key in ("front", "merge", "back", "vision"):
        assert b"type=fp4_e2m1" in plan_file(folder, key).read_bytes(), key
