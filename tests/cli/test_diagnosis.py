"""``validate --first-bad-stage`` and ``--layers`` as users call them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch

from d3tom_export.bundle.folder import Bundle, write_manifest
from d3tom_export.cpu.place import CPU_FOLDER, tuned_graph
from tests.conftest import OWN_GOLDEN, Invoke, raw_config, write_checkpoint
from tests.diagnosis.conftest import bump, change_weight, multiply_after

Q_PROJ = "model.transformer.blocks.3.q_proj"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # see tests/diagnosis/conftest.py
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def broken(bundle: Bundle, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "broken"))
    for key in ("back", "cached_back"):
        model = onnx.load(folder / f"{key}.onnx", load_external_data=False)
        change_weight(f"{Q_PROJ}.weight", bump)(model, folder)
        onnx.save(model, folder / f"{key}.onnx")
    shutil.rmtree(folder / CPU_FOLDER)  # or the intact graphs there would run
    write_manifest(folder, bundle.manifest)
    return folder


def test_an_intact_bundle_exits_with_0(bundle: Bundle, invoke: Invoke) -> None:
    result = invoke("validate", bundle.folder, "--layers", "--json", "-")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["passed"], record["first_bad_stage"], record["layers"]) == (True, None, None)
    assert record["cut"]["samples"] == 2  # one answer for each loop, unless --samples asks for more
    assert "Nothing departs." in result.stderr


def test_layers_names_the_module(broken: Path, invoke: Invoke, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = invoke("validate", broken, "--layers", "--no-kv-cache", "--json", report, "--save-inputs", tmp_path / "in")
    assert result.exit_code == 1, result.output
    assert f"Culprit: stage back, module {Q_PROJ} (weights {Q_PROJ}.weight), relative error" in result.stdout
    assert "--data-loader-script" in result.stdout
    assert "polygraphy run" not in result.stdout  # that is for engines
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["back.npz", "back_inputs.py"]
    record = json.loads(report.read_text())
    assert record["first_bad_stage"]["stage"] == "back"
    assert record["layers"]["module"] == Q_PROJ


def test_a_graph_rewritten_for_the_cpu_is_told_from_the_standard_one(
    bundle: Bundle, invoke: Invoke, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "tuned"))
    path = tuned_graph(folder, "fp32", "front")
    model = onnx.load(path, load_external_data=False)
    multiply_after("RMSNormalization", 1.5)(model, folder)
    onnx.save(model, path)
    write_manifest(folder, bundle.manifest)
    result = invoke("validate", folder, "--layers", "--no-kv-cache")
    assert result.exit_code == 1, result.output
    assert "Culprit: what onnxruntime made of stage front" in result.stdout
    assert "look at the one rewritten for the CPU, or at the other device" in result.stdout


def test_first_bad_stage_stops_at_the_stage(broken: Path, invoke: Invoke) -> None:
    result = invoke("validate", broken, "--first-bad-stage", "--kv-cache", "--samples", 2, "--json", "-")
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert (record["first_bad_stage"]["stage"], record["layers"]) == ("cached_back", None)
    assert record["cut"]["samples"] == 2
    assert "--layers looks inside" in result.stderr


def test_another_checkpoint_shows_in_every_stage_with_weights(bundle: Bundle, invoke: Invoke, tmp_path: Path) -> None:
    """The reference is the model that is given, not what the bundle holds."""
    other = write_checkpoint(tmp_path / "synthetic", raw_config(), seed=9)
    result = invoke("validate", bundle.folder, "--first-bad-stage", "--no-kv-cache", "--model", other, "--json", "-")
    assert result.exit_code == 1
    stages = json.loads(result.stdout)["stages"]
    assert [stage["departs"] for stage in stages] == [True] * 5 + [False]  # `certainty` has none


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--case", OWN_GOLDEN / "cached", "--layers"], 2, "look into a BUNDLE"),
        (["BUNDLE", "--save-inputs", "inputs"], 2, "--save-inputs goes with"),
        (["BUNDLE", "--layers", "--backend", "pytorch"], 1, "cannot run stages one at a time"),
    ],
)
def test_bad_calls(arguments: list[object], code: int, says: str, bundle: Bundle, invoke: Invoke) -> None:
    result = invoke("validate", *(bundle.folder if word == "BUNDLE" else word for word in arguments))
    assert result.exit_code == code, result.output
    assert says in result.stderr
