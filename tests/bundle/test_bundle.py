"""Bundles: verified before use, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.bundle.manifest import MANIFEST_FILE, SCHEMA_VERSION
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.errors import D3tomError
from d3tom_export.model.lavida import Lavida


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle to damage."""
    return Path(shutil.copytree(bundle.folder, tmp_path / "copy"))


def test_manifest_survives_a_round_trip(bundle: Bundle) -> None:
    assert load_bundle(bundle.folder).manifest == bundle.manifest


def test_manifest_names_every_file(bundle: Bundle) -> None:
    raw = json.loads((bundle.folder / MANIFEST_FILE).read_text())
    assert set(raw["files"]) == {
        path.relative_to(bundle.folder).as_posix() for path in bundle.folder.rglob("*") if path.is_file()
    } - {MANIFEST_FILE}
    assert raw["schema_version"] == SCHEMA_VERSION
    assert raw["stages"]["merge"]["outputs"][1]["axes"] == ["B", "K"]


def test_a_bundle_is_a_checkpoint_of_the_same_model(bundle: Bundle, eager_model: Lavida) -> None:
    import torch

    state = load_model(open_checkpoint(bundle.folder)).state_dict()
    for name, tensor in eager_model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "back.onnx").unlink(), "back.onnx is missing"),
        (lambda f: (f / "front.onnx").write_bytes(b"short"), r"front.onnx has 5 bytes, expected [\d,]+"),
        (
            lambda f: _flip_a_byte(f / "model-00001-of-00002.safetensors"),
            "model-00001-of-00002.safetensors does not match its sha256",
        ),
        (lambda f: (f / MANIFEST_FILE).unlink(), "is not a bundle"),
        (lambda f: (f / MANIFEST_FILE).write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / MANIFEST_FILE).write_text('{"schema_version": 99}'), "schema version 99"),
        (lambda f: (f / MANIFEST_FILE).write_text('{"schema_version": 5}'), "version 5.*Rebuild it with this version"),
        (lambda f: (f / MANIFEST_FILE).write_text('{"schema_version": 6}'), "missing required field model"),
    ],
)
def test_damage_is_found_before_anything_runs(copy: Path, damage, says: str) -> None:  # type: ignore[no-untyped-def]
    damage(copy)
    with pytest.raises(D3tomError, match=says):
        load_bundle(copy)


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_manifest_that_lists_too_little_is_refused(copy: Path) -> None:
    raw = json.loads((copy / MANIFEST_FILE).read_text())
    del raw["files"]["back.onnx"]
    (copy / MANIFEST_FILE).write_text(json.dumps(raw))
    with pytest.raises(D3tomError, match=r"back\.onnx is not listed"):
        load_bundle(copy)
    raw["files"]["back.onnx"] = {}
    (copy / MANIFEST_FILE).write_text(json.dumps(raw))
    with pytest.raises(D3tomError, match=r"files\[\.\.\.\]: object missing required field bytes"):
        load_bundle(copy)
