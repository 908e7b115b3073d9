"""Hashes that are kept from one opening of a bundle to the next: what is believed, what is seen, what is ignored."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from d3tom_export.bundle.folder import Bundle, load_bundle, write_manifest
from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.errors import D3tomError
from d3tom_export.trust import known_hashes
from d3tom_export.trust.known_hashes import RECORDS, KnownHashes
from d3tom_export.trust.user_cache import UserCache, cache_folder

SHARD = "model-00001-of-00002.safetensors"
OLD = 1_600_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "d3tom-export" / "verified"


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle whose files are old enough for their hashes to be kept."""
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    for path in filter(Path.is_file, folder.rglob("*")):
        os.utime(path, (OLD, OLD))
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed."""
    names: list[str] = []
    digest = known_hashes.file_sha256_of

    def note(file):  # type: ignore[no-untyped-def]
        names.append(Path(f"/proc/self/fd/{file.fileno()}").resolve().name)
        return digest(file)

    monkeypatch.setattr(known_hashes, "file_sha256_of", note)
    return names


def _files(folder: Path) -> set[str]:
    return set(json.loads((folder / MANIFEST_FILE).read_text())["files"])


def _flip_a_byte(path: Path) -> None:
    """In place, as a disk's fault or a training run would."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def test_a_second_opening_hashes_nothing(copy: Path, hashed: list[str]) -> None:
    load_bundle(copy)
    assert len(hashed) == len(_files(copy))
    hashed.clear()
    assert load_bundle(copy).manifest.stages
    assert hashed == []


def test_verify_full_hashes_every_file_and_a_moved_bundle_none(copy: Path, hashed: list[str]) -> None:
    load_bundle(copy)
    hashed.clear()
    load_bundle(copy, "full")
    assert len(hashed) == len(_files(copy))
    hashed.clear()
    load_bundle(copy.rename(copy.with_name("moved")))
    assert hashed == []


def _replace_with_same_times(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    os.utime(other, (OLD, OLD))
    other.replace(path)


def _write_and_restore_mtime(path: Path) -> None:
    _flip_a_byte(path)
    os.utime(path, (OLD, OLD))


@pytest.mark.parametrize("damage", [_flip_a_byte, _replace_with_same_times, _write_and_restore_mtime])
def test_damage_after_the_first_opening_is_seen(copy: Path, damage) -> None:  # type: ignore[no-untyped-def]
    load_bundle(copy)
    damage(copy / SHARD)
    for _ in range(2):  # and not forgotten
        with pytest.raises(D3tomError, match=f"{SHARD} does not match its sha256"):
            load_bundle(copy)


def test_only_what_changed_is_hashed_again(copy: Path, hashed: list[str]) -> None:
    load_bundle(copy)
    hashed.clear()
    os.utime(copy / "back.onnx", (OLD + 1, OLD + 1))
    load_bundle(copy)
    assert hashed == ["back.onnx"]


def test_a_manifest_that_lists_another_hash_is_held_against_the_file(copy: Path, hashed: list[str]) -> None:
    load_bundle(copy)
    raw = json.loads((copy / MANIFEST_FILE).read_text())
    raw["files"][SHARD]["sha256"] = "0" * 64
    (copy / MANIFEST_FILE).write_text(json.dumps(raw))
    hashed.clear()
    with pytest.raises(D3tomError, match=f"{SHARD} does not match its sha256"):
        load_bundle(copy)
    assert hashed == [SHARD]


def test_a_file_written_just_before_it_was_hashed_is_not_known(copy: Path, hashed: list[str]) -> None:
    os.utime(copy / SHARD)
    load_bundle(copy)
    hashed.clear()
    load_bundle(copy)
    assert hashed == [SHARD]


def test_a_build_s_own_hashes_serve_the_first_opening(copy: Path, hashed: list[str]) -> None:
    manifest = load_bundle(copy).manifest
    shutil.rmtree(cache_folder() or "")
    new = copy.rename(copy.with_name(".partial"))
    write_manifest(new, manifest)
    hashed.clear()
    load_bundle(new.rename(copy))
    assert hashed == []


def test_weights_that_nobody_reads_are_not_hashed_until_somebody_does(copy: Path, hashed: list[str]) -> None:
    opened = load_bundle(copy, reads_weights=False)
    assert not [name for name in hashed if name.endswith(".safetensors")]
    opened.image_newline()
    (read,) = [name for name in hashed if name.endswith(".safetensors")]
    hashed.clear()
    load_bundle(copy, reads_weights=False).image_newline()
    assert hashed == []
    _flip_a_byte(copy / read)
    opened = load_bundle(copy, reads_weights=False)
    with pytest.raises(D3tomError, match=f"{read} does not match its sha256"):
        opened.image_newline()
    with pytest.raises(D3tomError, match=f"{read} does not match its sha256"):
        load_bundle(copy, "full", reads_weights=False)


def _only(cache: Path) -> Path:
    (record,) = cache.iterdir()
    return record


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"schema": 1}', b'{"schema": 9, "files": {}}',
        b'{"schema": 1, "files": {"back.onnx": [1, 2]}}', b'{"schema": 1, "files": {"../../x": ["", ""]}}',
    ],
)  # fmt: skip
def test_a_damaged_record_is_as_good_as_none(copy: Path, cache: Path, hashed: list[str], content: bytes) -> None:
    load_bundle(copy)
    _only(cache).write_bytes(content)
    hashed.clear()
    load_bundle(copy)
    assert len(hashed) == len(_files(copy))
    hashed.clear()
    load_bundle(copy)
    assert hashed == []


def _too_long(record: Path) -> None:
    record.write_bytes(b" " * (RECORDS.limit + 1))


def _link(record: Path) -> None:
    record.rename(record.with_name("elsewhere"))
    record.symlink_to("elsewhere")


def _pipe(record: Path) -> None:
    record.unlink()
    os.mkfifo(record)


def _folder_of_others(record: Path) -> None:
    record.parent.chmod(0o777)


@pytest.mark.parametrize("change", [_too_long, _link, _pipe, _folder_of_others])
def test_a_record_that_another_user_could_have_made_is_none(copy: Path, cache: Path, hashed: list[str], change) -> None:  # type: ignore[no-untyped-def]
    load_bundle(copy)
    change(_only(cache))
    hashed.clear()
    load_bundle(copy)
    assert len(hashed) == len(_files(copy))


def test_without_a_place_to_keep_them_everything_is_hashed_each_time(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file"), "/dev/null", "/proc/nowhere"):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        for _ in range(2):
            hashed.clear()
            load_bundle(copy)
            assert len(hashed) == len(_files(copy))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", _no_home)
    load_bundle(copy)


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_xdg_s_variable_counts_where_it_is_an_absolute_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / "home" / ".cache" / "d3tom-export"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "d3tom-export"


def test_two_at_once_keep_what_both_found(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / name).write_text(name)
        os.utime(folder / name, (OLD, OLD))
    both = [KnownHashes(folder), KnownHashes(folder)]
    found = {}
    for known, name in zip(both, ("one", "two"), strict=True):
        with (folder / name).open("rb") as file:
            found[name] = known.hash_file(name, file)
    for known in both:
        known.save()
    assert {name: sha for name, (_, sha) in KnownHashes(folder)._known.items()} == found


def test_no_more_files_are_kept_than_allowed_and_the_oldest_go(cache: Path) -> None:
    store = UserCache("verified", most=3, limit=10)
    for number in range(5):
        assert store.write(f"{number}", b"x")
        os.utime(cache / f"{number}", (OLD + number, OLD + number))
        if number == 2:
            assert store.read("0") == b"x"  # and so is young again
    assert {path.name for path in cache.iterdir()} == {"0", "3", "4"}
    assert not store.write("long", b"x" * 11)
    assert not (cache.stat().st_mode | cache.parent.stat().st_mode) & 0o077
    store.remove("0")
    store.remove("0")
    assert store.read("0") is None


def test_a_hash_is_worked_out_once(tmp_path: Path, hashed: list[str]) -> None:
    """Of a file that has no manifest to say what it should be."""
    path = tmp_path / "weights.safetensors"

    def sha256() -> str:
        hashes = KnownHashes(tmp_path)
        with path.open("rb") as file:
            found = hashes.sha256_of(path.name, file)
        hashes.save()
        return found

    path.write_bytes(b"one")
    os.utime(path, (OLD, OLD))
    first = sha256()
    assert first == hashlib.sha256(b"one").hexdigest()
    assert sha256() == first
    assert hashed == [path.name]
    path.write_bytes(b"two")
    os.utime(path, (OLD, OLD))
    assert sha256() == hashlib.sha256(b"two").hexdigest()
