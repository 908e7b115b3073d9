"""Engines from the command line: built, kept, shown, and refused in one paragraph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.cli.main import main
from d3tom_export.engines.record import Target, built_engines

RTX = ("--engine", "tensorrt-rtx")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _error(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stderr[result.stderr.index("Error: ") :]


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(bundle.folder, tmp_path_factory.mktemp("cli-engines") / "bundle"))


def test_engines_are_added_then_kept_then_shown(folder: Path, tmp_path: Path) -> None:
    arguments = ("build", "--bundle", folder, *RTX, "--sm", 89, "--sm", 120, "--precision", "bf16")
    first = invoke(*arguments, "--json", tmp_path / "first.json")
    assert first.exit_code == 0, first.output
    assert "building cached_merge for SM89+SM120 in bf16" in first.stderr
    assert "merge as a plugin" in first.stdout
    assert "kept visual tokens" in first.stdout
    assert "engines/tensorrt-rtx-sm89-sm120-bf16/merge.plan" in first.stdout
    assert "merge sums (inside the merge node)" in first.stdout
    result = json.loads((tmp_path / "first.json").read_text())
    assert result["passed"]
    assert result["sizes"]["answer_tokens"] == "8:8:8"
    assert {entry["reused"] for entry in result["engines"]} == {False}
    assert any(entry["precision"]["float32"].get("softmax") for entry in result["engines"])

    second = invoke(*arguments)
    assert second.exit_code == 0, second.output
    engines = len(load_bundle(folder).manifest.stages) - 1  # a prompt runs on the steps' engines
    assert second.stdout.count("unchanged, kept") == engines
    assert ".plan" in second.stdout
    assert " built" not in second.stdout

    changed = invoke(*arguments[:-1], "bf16", "--merge-op", "onnx")
    assert 'merge_op ("plugin", now "onnx")' in changed.stdout
    assert changed.stdout.count("unchanged, kept") == engines - 2

    shown = invoke("inspect", folder, "--by-hand")
    assert shown.exit_code == 0, shown.output
    assert "engines/tensorrt-rtx-sm89-sm120-bf16/" in shown.stdout
    assert "POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert" in shown.stdout
    assert "cached loop: about" in shown.stdout  # memory
    assert "--compute-capabilities 8.9 12.0" in shown.stdout
    assert "--computeCapabilities=89,120" in shown.stdout
    assert "--profile=1" in shown.stdout
    data = json.loads(invoke("inspect", folder, "--json", "-").stdout)
    assert [entry["target"]["sms"] for entry in data["engines"]] == [[89, 120]] * engines
    memory = {entry["loop"]: entry for entry in data["device_memory"]}
    assert memory.keys() == {"cached", "uncached"}
    assert memory["cached"]["cache"] > 0 == memory["uncached"]["cache"]
    assert memory["cached"]["total"] > memory["cached"]["weights"] > 0


def test_a_new_bundle_comes_with_its_engines(checkpoint_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    result = invoke(
        *("build", "--model", checkpoint_folder, "--layer", 1, "--ratio", 0.5, "--self-check", 0, "--output", output),
        *(*RTX, "--sm", 89, "--precision", "fp16", "--visual-tokens", "1:30:80", "--batch", "1:1:2"),
    )
    assert result.exit_code == 0, result.output
    assert "1:30:80" in result.stdout
    (target,) = built_engines(output)
    assert target == Target("tensorrt-rtx", (89,), "fp16")
    record = built_engines(output)[target]["merge"]
    assert record.profiles[0]["keep"] == ((1,), (15,), (80,))
    assert record.profiles[0]["deciders"] == ((1, 8), (1, 8), (2, 8))
    load_bundle(output)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--sm", 89), 2, "--sm concerns engines, and --engine none builds none"),
        (("--merge-op", "onnx", "--precision", "fp16"), 2, "--merge-op concerns engines"),
        ((*RTX,), 2, "Give --sm, the compute capability to build for"),
        ((*RTX, "--sm", 89, "--merge-op", "aot"), 2, "TensorRT-RTX has no ahead-of-time plugins"),
        ((*RTX, "--sm", 90), 1, "builds no engines of merging stages for SM90; it does for SM80"),
        (("--engine", "tensorrt", "--sm", 90), 1, "need the package tensorrt"),
        ((*RTX, "--sm", 89, "--visual-tokens", "9:5:7"), 2, "does not satisfy 1 <= min <= opt <= max"),
        ((*RTX, "--sm", 89, "--visual-tokens", "many"), 2, "is not a range of sizes"),
        ((*RTX, "--sm", 89, "--visual-tokens", "1:500:900"), 1, "would exceed the model's longest sequence of 640"),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_work(
    checkpoint_folder: Path, tmp_path: Path, arguments: tuple[object, ...], code: int, message: str
) -> None:
    output = tmp_path / "bundle"
    result = invoke("build", "--model", checkpoint_folder, "--layer", 1, "--output", output, *arguments)
    assert message in _error(result, code)
    assert not list(tmp_path.iterdir())
    assert "exporting" not in result.stderr


def test_a_bundle_option_and_a_new_bundles_options_exclude_each_other(folder: Path) -> None:
    result = invoke("build", "--bundle", folder, *RTX, "--sm", 89, "--layer", 1, "--full-vocabulary")
    assert "--layer, --clip-vocabulary concerns a new bundle" in _error(result, 2)
    assert "say which with --engine" in _error(invoke("build", "--bundle", folder), 2)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    assert "is not a bundle" in _error(invoke("build", "--bundle", tmp_path, *RTX, "--sm", 89), 1)
