"""Disks that are full, small, read only, or somebody else's: one paragraph, and nothing left."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from d3tom_export.bundle.folder import Bundle, load_bundle, write_manifest
from d3tom_export.bundle.output import new_folder, sweep
from d3tom_export.errors import D3tomError

NOBODY = 65534


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"file systems cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_becomes_full(small_disk: Path) -> None:
    def fill(partial: Path) -> None:
        for number in range(100):
            (partial / f"{number}.onnx").write_bytes(bytes(10_000))

    with (
        pytest.raises(D3tomError, match=r"disk is full.*What was written is removed.*Free some space"),
        new_folder(small_disk / "deep" / "out", False) as partial,
    ):
        fill(partial)
    assert list(small_disk.iterdir()) == []


def test_a_mounted_output_is_not_replaced(small_disk: Path, bundle: Bundle) -> None:
    """A file system cannot be exchanged for a folder."""
    for path in bundle.folder.iterdir():
        if path.is_file() and path.suffix == ".json" and path.stat().st_size < 20_000:
            shutil.copyfile(path, small_disk / path.name)
    write_manifest(small_disk, bundle.manifest)
    before = sorted(path.name for path in small_disk.iterdir())
    with (
        pytest.raises(D3tomError, match=r"cannot be replaced.*a file system of its own"),
        new_folder(small_disk, True) as partial,
    ):
        write_manifest(partial, bundle.manifest)
    assert sorted(path.name for path in small_disk.iterdir()) == before
    assert [path.name for path in small_disk.parent.iterdir()] == [small_disk.name]


def _as_nobody(work: Callable[[], object]) -> str:
    """What ``work`` raises in a process of another user."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            work()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as told:
        said = told.read()
    os.waitpid(process, 0)
    return said


@pytest.fixture
def open_place(tmp_path: Path) -> Path:
    """A folder that everybody reaches; those that pytest makes are their user's alone."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/") and folder.stat().st_mode & 0o055 != 0o055:
            folder.chmod(0o755)
    place = tmp_path / "place"
    place.mkdir()
    return place


def _build(output: Path, meanwhile: Callable[[], object] = lambda: None, force: bool = False) -> None:
    with new_folder(output, force) as partial:
        (partial / "config.json").write_text("{}")
        meanwhile()
        (partial / "front.onnx").write_text("")


def test_no_permission_is_said(open_place: Path) -> None:
    said = _as_nobody(lambda: _build(open_place / "out"))
    assert said.startswith("D3tomError: ")
    assert "cannot be written: [Errno 13] Permission denied" in said
    assert list(open_place.iterdir()) == []


def test_a_parent_made_read_only_meanwhile_is_said_and_the_rest_swept(open_place: Path) -> None:
    os.chown(open_place, NOBODY, NOBODY)
    said = _as_nobody(lambda: _build(open_place / "out", lambda: open_place.chmod(0o555)))
    assert said.startswith("D3tomError: ")
    assert "cannot be written any more (Permission denied)" in said
    (left,) = open_place.iterdir()  # empty, but it cannot be taken away
    assert list(left.iterdir()) == []
    open_place.chmod(0o755)
    assert _as_nobody(lambda: sweep(open_place / "out")) == ""
    assert list(open_place.iterdir()) == []


def test_what_another_user_left_is_named(open_place: Path) -> None:
    open_place.chmod(0o777)
    assert _as_nobody(lambda: _build(open_place / "out", lambda: os._exit(9))) == ""
    (left,) = open_place.iterdir()
    (told,) = sweep(open_place / "out")
    assert told == f"{left} was left by a killed build of another user (number {NOBODY}), who may remove it."
    assert left.is_dir()
    _build(open_place / "out")


def test_a_bundle_on_a_read_only_folder_runs(open_place: Path, bundle: Bundle) -> None:
    copy = Path(shutil.copytree(bundle.folder, open_place / "copy"))
    for path in (*copy.rglob("*"), copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert _as_nobody(lambda: load_bundle(copy)) == ""
