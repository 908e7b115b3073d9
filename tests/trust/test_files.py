"""Files of others: only regular ones inside their folder are opened, and none that exists is ever written."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.errors import D3tomError
from d3tom_export.trust.files import (
    check_name,
    copy_file,
    create_file,
    find_inside,
    is_there,
    open_file,
    read_bytes,
    write_file,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    (inside / "config.json").write_text("{}")
    (tmp_path / "secret").write_text("private")
    return inside


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../secret", "/etc/passwd", "a//b", "a/../b", "a/", "a\\b", "a\nb", "a\x1bb", "x" * 256, None, 3],
)
def test_names_that_are_none(name: object, folder: Path) -> None:
    with pytest.raises(D3tomError):
        check_name(name)
    if isinstance(name, str):
        with pytest.raises(D3tomError):
            find_inside(folder, name)


@pytest.mark.parametrize("name", ["w1.dat", "embed.onnx", ".safetensors", "a.safetensors.bak"])
def test_names_must_end_as_expected(name: str) -> None:
    with pytest.raises(D3tomError, match=r"does not end in \.safetensors"):
        check_name(name, suffix=".safetensors")


@given(st.text(max_size=40))
def test_no_accepted_name_leaves_its_folder(name: str) -> None:
    try:
        check_name(name)
    except D3tomError:
        return
    path = os.path.normpath(f"/folder/{name}")
    assert path.startswith("/folder/")
    assert path == f"/folder/{name}"


def test_files_are_found_through_links_inside(folder: Path) -> None:
    (folder / "link.json").symlink_to("config.json")
    assert find_inside(folder, "config.json") == (folder / "config.json").resolve()
    assert find_inside(folder, "link.json") == (folder / "config.json").resolve()


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "/dev/zero", "/proc/self/environ"])
def test_links_out_are_refused(folder: Path, target: str) -> None:
    (folder / "tokenizer.json").symlink_to(target)
    with pytest.raises(D3tomError, match="leads out of its folder"):
        find_inside(folder, "tokenizer.json")


def test_linked_folders_do_not_lead_out_either(folder: Path) -> None:
    (folder / "cpu").symlink_to(folder.parent)
    with pytest.raises(D3tomError, match="leads out of its folder"):
        find_inside(folder, "cpu/secret")


def test_links_to_nothing_and_in_circles(folder: Path) -> None:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    (folder / "c").symlink_to("nothing")
    assert is_there(folder, "c")
    with pytest.raises(D3tomError, match="cannot be read"):
        find_inside(folder, "a")
    with pytest.raises(D3tomError, match="is a link to nothing"):
        find_inside(folder, "c")
    with pytest.raises(D3tomError, match="does not exist"):
        find_inside(folder, "d")


def _snapshot(root: Path) -> Path:
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "0123abc"
    (snapshot / "cpu").mkdir(parents=True)
    return snapshot


def test_a_hub_cache_is_followed_into_its_blobs(tmp_path: Path) -> None:
    snapshot = _snapshot(tmp_path / "models--a--b")
    blob = tmp_path / "models--a--b" / "blobs" / ("0a" * 32)
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to(f"../../blobs/{blob.name}")
    (snapshot / "cpu" / "back.onnx").symlink_to(f"../../../blobs/{blob.name}")
    assert find_inside(snapshot, "config.json") == blob.resolve()
    assert find_inside(snapshot, "cpu/back.onnx") == blob.resolve()


def test_what_only_looks_like_a_hub_cache_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("private")
    snapshot = _snapshot(tmp_path / "models--a--b")
    name = "0a" * 32
    (tmp_path / "models--a--b" / "blobs" / name).symlink_to(tmp_path / "secret")
    (tmp_path / "models--a--b" / "blobs" / "id_rsa").write_text("private")
    (snapshot / "a").symlink_to(f"../../blobs/{name}")
    (snapshot / "b").symlink_to("../../blobs/id_rsa")
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / name).write_text("private")
    other = tmp_path / "other" / "snapshots" / "1"
    other.mkdir(parents=True)
    (tmp_path / "other" / "blobs").symlink_to(keys)
    (other / "c").symlink_to(f"../../blobs/{name}")
    for folder, file in ((snapshot, "a"), (snapshot, "b"), (other, "c")):
        with pytest.raises(D3tomError, match="leads out of its folder"):
            find_inside(folder, file)


def test_only_regular_files_are_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "inner").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
        for name, kind in (("pipe", "a named pipe"), ("inner", "a folder"), ("socket", "a socket|cannot be read")):
            with pytest.raises(D3tomError, match=kind):
                open_file(folder / name)
            with pytest.raises(D3tomError):
                find_inside(folder, name)
    with pytest.raises(D3tomError, match="a device"):
        open_file(Path("/dev/zero"))
    with pytest.raises(D3tomError, match="is no path"):
        open_file(Path("a\0b"))


def test_no_more_is_read_than_allowed(folder: Path) -> None:
    path = folder / "config.json"
    assert read_bytes(path, 2) == b"{}"
    with (folder / "huge").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(D3tomError, match=r"has 1,099,511,627,776 bytes, at most 100 are expected"):
        read_bytes(folder / "huge", 100)


def test_nothing_that_exists_is_written(folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent / "secret")
    (folder / "broken").symlink_to(folder.parent / "new")
    for name in ("config.json", "link", "broken"):
        with pytest.raises(FileExistsError):
            create_file(folder / name)
        with pytest.raises(FileExistsError):
            write_file(folder / name, b"")
        with pytest.raises(FileExistsError):
            copy_file(folder / "config.json", folder / name)
    assert (folder.parent / "secret").read_text() == "private"
    assert not (folder.parent / "new").exists()
    copy_file(folder / "config.json", folder / "copy")
    assert (folder / "copy").read_text() == "{}"
