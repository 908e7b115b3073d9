"""A bundle is compared with the checkpoint it came from, as long as that is there as it was."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import Manifest
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.errors import D3tomError
from d3tom_export.parity.source import check_same_config, find_source, fingerprint, note_source
from d3tom_export.parity.validate import OWN_WEIGHTS
from tests.conftest import raw_config, write_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "own", raw_config())


def _of(bundle: Bundle, source: dict[str, str] | None) -> Bundle:
    return replace(bundle, manifest=replace(bundle.manifest, source=source))


def test_a_build_notes_it(bundle: Bundle, checkpoint_folder: Path, tiny_bundle: Bundle) -> None:
    assert bundle.manifest.source == note_source(checkpoint_folder)
    assert Manifest.from_json(bundle.manifest.to_json()).source == bundle.manifest.source
    found = find_source(bundle, None)
    assert found.folder.resolve() == checkpoint_folder.resolve()
    assert (found.described, found.notice) == (f"the checkpoint {found.folder}, which the bundle was built from", None)
    assert tiny_bundle.manifest.source is None  # the package's own is known by its weights
    assert find_source(tiny_bundle, None).folder == bundled_model()


def test_one_in_the_home_folder_tells_no_name(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert note_source(checkpoint)["folder"] == "~/own"


@pytest.mark.parametrize("change", ["gone", "touched", "a stranger's", "none", "no path"])
def test_another_is_not_opened(bundle: Bundle, checkpoint: Path, change: str) -> None:
    """And the report says that the comparison is with the bundle itself, and why."""
    source: dict[str, str] | None = note_source(checkpoint)
    assert source is not None
    if change == "gone":
        shutil.rmtree(checkpoint)
    elif change == "touched":
        os.utime(next(checkpoint.glob("*.safetensors")), ns=(1, 1))
    elif change == "a stranger's":
        source = source | {"fingerprint": "0" * 64}
    elif change == "no path":
        source = source | {"folder": "own\0"}
    else:
        source = None
    found = find_source(_of(bundle, source), None)
    assert (found.folder, found.described) == (bundle.folder, OWN_WEIGHTS)
    assert found.notice is not None
    assert "the bundle's own weights" in found.notice


def test_one_that_is_given_is_taken(bundle: Bundle, checkpoint: Path) -> None:
    assert find_source(bundle, checkpoint).described == f"the checkpoint {checkpoint}"
    assert find_source(bundle, bundle.folder).described == OWN_WEIGHTS


def test_a_config_that_was_changed_is_named(bundle: Bundle, tmp_path: Path) -> None:
    changed = open_checkpoint(write_checkpoint(tmp_path / "other", raw_config(mask_token_id=259)))
    with pytest.raises(D3tomError, match=r"mask_token_id is 258 in the bundle and 259 there"):
        check_same_config(bundle, changed)


def test_the_fingerprint_sees_weights_and_config(checkpoint: Path) -> None:
    before = fingerprint(checkpoint)
    os.utime(checkpoint / "config.json", ns=(5, 5))
    assert fingerprint(checkpoint) != before
