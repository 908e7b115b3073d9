"""What a bundle takes over from a checkpoint beside its weights: a list, regular files inside the folder, limits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from d3tom_export.checkpoint.companions import COPIED_FILES, JSON_FILES, OPAQUE_FILES, check_companions, copy_companions
from d3tom_export.errors import D3tomError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    for name in JSON_FILES:
        (inside / name).write_bytes(b' {"a": 1}\r\n')
    for name in OPAQUE_FILES:
        (inside / name).write_bytes(b"\x00opaque")
    (inside / "README.md").write_text("not on the list")
    (inside / "chat_template.jinja").write_text("not on the list")
    (tmp_path / "secret").write_text('{"token": "PRIVATE-KEY"}')
    (tmp_path / "bundle").mkdir()
    return inside


def test_the_very_bytes_of_the_listed_files_are_taken(folder: Path) -> None:
    target = folder.parent / "bundle"
    check_companions(folder)
    copy_companions(folder, target)
    assert {path.name for path in target.iterdir()} == set(COPIED_FILES)
    assert all((target / name).read_bytes() == (folder / name).read_bytes() for name in COPIED_FILES)
    with pytest.raises(FileExistsError):  # nothing that is there is written
        copy_companions(folder, target)


def test_absent_files_are_left_out(folder: Path) -> None:
    for name in COPIED_FILES[1:]:
        (folder / name).unlink()
    copy_companions(folder, folder.parent / "bundle")
    assert [path.name for path in (folder.parent / "bundle").iterdir()] == [COPIED_FILES[0]]


def _link_out(path: Path) -> None:
    path.symlink_to(path.parent.parent / "secret")


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


@pytest.mark.parametrize("make", [_link_out, _link_to_nothing, os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", COPIED_FILES)
def test_whatever_is_no_file_inside_the_folder_is_refused(
    folder: Path, name: str, make: Callable[[Path], None]
) -> None:
    (folder / name).unlink()
    make(folder / name)
    for use in (check_companions, lambda source: copy_companions(source, folder.parent / "bundle")):
        with pytest.raises(D3tomError, match=name):
            use(folder)
    assert not any(b"PRIVATE-KEY" in path.read_bytes() for path in (folder.parent / "bundle").iterdir())


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", [b"PRIVATE-KEY", b"[1]", b'{"a": NaN}', b'{"a":' * 100_000, b"\xff\xfe{\0}\0"])
def test_documents_must_parse(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(D3tomError, match=f"{name} cannot be read as JSON"):
        check_companions(folder)


@pytest.mark.parametrize("name", COPIED_FILES)
def test_each_has_a_limit(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.truncate({**JSON_FILES, **OPAQUE_FILES}[name] + 1)
    with pytest.raises(D3tomError, match=rf"{name} has [\d,]+ bytes, at most"):
        check_companions(folder)
