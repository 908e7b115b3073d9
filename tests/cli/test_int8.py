"""``--precision int8`` as users call it: added to a bundle, run, proven, and refused where it means nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.cost import bench
from d3tom_export.cpu.place import tuned_graph
from tests.conftest import Invoke


@pytest.fixture(scope="module")
def folder(tiny_bundle: Bundle, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path_factory.mktemp("int8") / "bundle"))
    result = invoke("build", "--bundle", folder, "--precision", "int8")
    assert result.exit_code == 0, result.output
    return folder


def test_a_bundle_that_is_there_gets_int8_graphs(folder: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned_graph(folder, "int8", "back").is_file()
    inspected = invoke("inspect", folder)
    assert inspected.exit_code == 0, inspected.output  # every file is in the manifest with its hash
    answer = invoke("run", folder, "--prompt", "What?", "--precision", "int8", "--json", "-")
    assert answer.exit_code == 0, answer.output
    opened: list[str | None] = []

    def measured(*arguments: Any, **options: Any) -> None:
        opened.append(arguments[-1])

    monkeypatch.setattr(bench, "peak_memory", measured)
    timed = invoke("bench", folder, "--precision", "int8", "--rounds", 1, "--gen-length", 4, "--json", "-")
    assert timed.exit_code == 0, timed.output
    assert json.loads(timed.stdout)["precision"] == "int8"
    assert opened == ["int8"] * 4


def test_validate_says_how_many_tokens_agree(folder: Path, invoke: Invoke) -> None:
    result = invoke(
        "validate", folder, "--precision", "int8", "--samples", 1, "--steps", 4, "--kv-cache", "--json", "-"
    )
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["passed"], record["precision"], record["token_agreement_needed"]) == (True, "int8", 0.99)
    assert record["token_agreement"] >= 0.99


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["validate", "--precision", "int8", "--layers"], "held against float32 by bounds on its answers"),
        (["build", "--precision", "int8", "--engine", "tensorrt-rtx", "--sm", 89], "leave --engine out"),
        (["run", "--prompt", "?", "--precision", "int8", "--backend", "pytorch"], "take --backend onnxruntime"),
    ],
)
def test_calls_that_mean_nothing(folder: Path, invoke: Invoke, arguments: list[object], says: str) -> None:
    command, *rest = arguments
    result = invoke(command, *([] if command == "build" else [folder]), *rest)
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.stderr.split())
