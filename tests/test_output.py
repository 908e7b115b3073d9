"""Output folders: written whole or not at all, cleared of what killed builds left, never at somebody else's cost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from d3tom_export.bundle import MANIFEST_FILE, Bundle, write_manifest
from d3tom_export.errors import D3tomError
from d3tom_export.output import (
    new_folder,
)


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle to replace."""
    return Path(shutil.copytree(bundle.folder, tmp_path / "copy"))


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "bundle"
    with new_folder(output, force=False) as partial:
        (partial / "file").write_text("content")
        assert not output.exists()
    assert (output / "file").read_text() == "content"
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "bundle", force=False) as partial:
            (partial / "file").write_text("content")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_bundle_it_would_have_replaced(copy: Path) -> None:
    before = (copy / MANIFEST_FILE).read_text()
    with pytest.raises(RuntimeError), new_folder(copy, force=True):
        raise RuntimeError
    assert (copy / MANIFEST_FILE).read_text() == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_only_a_bundle_is_ever_replaced(copy: Path, tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(D3tomError, match="--force to replace it"), new_folder(copy, force=False):
        pass
    with new_folder(copy, force=True) as partial:
        (partial / "new").write_text("")
        write_manifest(partial, bundle.manifest)
    assert sorted(path.name for path in copy.iterdir()) == [MANIFEST_FILE, "new"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    foreign = tmp_path / "extension"
    foreign.mkdir()
    (foreign / MANIFEST_FILE).write_text('{"name": "my browser extension"}')
    mixed = tmp_path / "mixed"
    shutil.copytree(bundle.folder, mixed)
    (mixed / "notes.txt").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(bundle.folder)
    for folder in (precious, foreign, mixed, link):
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(D3tomError, match="is not a bundle"), new_folder(folder, force=True):
            pass
        assert sorted(path.name for path in folder.iterdir()) == before


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(D3tomError, match="cannot be written"), new_folder(tmp_path / "file" / "bundle", force=False):
        pass


def test_a_failure_removes_the_parents_it_made(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "b" / "bundle", force=False):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
