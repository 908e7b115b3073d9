"""Output folders: written whole or not at all, cleared of what killed builds left, never at somebody else's cost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from d3tom_export.bundle import output as output_module
from d3tom_export.bundle.folder import Bundle, load_bundle, write_manifest
from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.bundle.output import (
    ABANDONED_HOURS,
    LOCK_FILE,
    NEW_FOLDER,
    OLD_FOLDER,
    check_output_folder,
    kept_folder,
    locked,
    new_folder,
    sweep,
    work_folder,
)
from d3tom_export.errors import D3tomError
from d3tom_export.trust import replace


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


def _without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems whose rename has no flags."""
    monkeypatch.setattr(replace, "_renameat2", lambda: lambda *arguments: -1)
    monkeypatch.setattr(replace.ctypes, "get_errno", lambda: errno.EINVAL)


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of replacing a folder."""
    if request.param == "two renames":
        _without_exchange(monkeypatch)


def _build(output: Path, *steps: Callable[[Path], object], force: bool = False) -> None:
    with new_folder(output, force) as partial:
        for step in steps:
            step(partial)


def _fill(folder: Path, bundle: Bundle, name: str = "new.json") -> None:
    (folder / name).write_text("{}")
    write_manifest(folder, bundle.manifest)


@pytest.mark.usefixtures("either_way")
def test_a_bundle_is_replaced(copy: Path, bundle: Bundle) -> None:
    with new_folder(copy, force=True) as partial:
        _fill(partial, bundle)
    assert sorted(path.name for path in copy.iterdir()) == [MANIFEST_FILE, "new.json"]
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


@pytest.mark.usefixtures("either_way")
def test_what_became_the_users_meanwhile_is_not_replaced(copy: Path, bundle: Bundle, tmp_path: Path) -> None:
    """A file of theirs appears in the output after the last look at it."""
    looked = output_module.check_output_folder

    def looks(output: Path, force: bool, kind: output_module.Kind) -> None:
        looked(output, force, kind)
        (copy / "thesis.tex").write_text("years of work")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(D3tomError, match="holds files that no build wrote"):
        _build(
            copy,
            lambda partial: _fill(partial, bundle),
            lambda partial: patch.setattr(output_module, "check_output_folder", _first(looks, looked)),
            force=True,
        )
    assert (copy / "thesis.tex").read_text() == "years of work"
    (copy / "thesis.tex").unlink()
    load_bundle(copy)
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]


def _first(first: Callable[..., None], then: Callable[..., None]) -> Callable[..., None]:
    """A function whose first call is another's."""
    calls = [first]
    return lambda *arguments: (calls.pop() if calls else then)(*arguments)


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path, bundle: Bundle) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(D3tomError, match="exists"):
        # Even an empty one, which a plain rename would replace.
        _build(output, lambda partial: _fill(partial, bundle), lambda partial: output.mkdir())
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle"]


def test_an_output_that_vanishes_meanwhile_is_written(copy: Path, bundle: Bundle) -> None:
    with new_folder(copy, force=True) as partial:
        _fill(partial, bundle)
        shutil.rmtree(copy)
    assert sorted(path.name for path in copy.iterdir()) == [MANIFEST_FILE, "new.json"]
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "gone"), RuntimeError("a library's words"), None])
def test_a_parent_removed_meanwhile_is_said(tmp_path: Path, error: Exception | None) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()

    def fail(partial: Path) -> None:
        shutil.rmtree(parent)
        if error:
            raise error

    with pytest.raises(D3tomError, match="was removed or moved meanwhile"):
        _build(parent / "b", fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "disk is full.*MB are free.*is removed"),
        (errno.EDQUOT, "its quota is"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "cannot be written any more"),
        (errno.EACCES, "cannot be written any more"),
        (errno.EBUSY, "a file system of its own"),
    ],
)
def test_what_the_file_system_refuses_is_one_paragraph(tmp_path: Path, number: int, says: str) -> None:
    with pytest.raises(D3tomError, match=says), new_folder(tmp_path / "bundle", False) as partial:
        raise OSError(number, os.strerror(number), str(partial / "front.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_any_length_is_written_and_swept(tmp_path: Path) -> None:
    output = tmp_path / ("ä" * 127)
    with new_folder(output, False) as partial:
        (partial / "config.json").write_text("{}")
    shutil.rmtree(output)
    _die_in(output)
    assert "was removed" in sweep(output)[0]
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import os, sys
from pathlib import Path
from d3tom_export.bundle.output import new_folder
with new_folder(Path(sys.argv[1]), bool(sys.argv[2:])) as partial:
    (partial / "front.onnx").write_bytes(b"half")
    print(partial.parent, flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), 9)
"""


def _start(output: Path, *force: str) -> tuple[subprocess.Popen[str], Path]:
    """A build at work in another process, and its folder; it is killed when its input ends."""
    build = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(output), *force], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert build.stdout is not None
    return build, Path(build.stdout.readline().strip())


def _die_in(output: Path, *force: str) -> Path:
    """What a killed build of ``output`` left."""
    build, folder = _start(output, *force)
    build.communicate()
    assert folder.is_dir()
    return folder


def test_the_next_build_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    folder = _die_in(tmp_path / "out")
    (told,) = sweep(tmp_path / "out")
    assert told == f"{folder} was removed; a killed build had left it."
    assert list(tmp_path.iterdir()) == []


def test_a_build_at_work_is_left_alone_and_keeps_others_out(tmp_path: Path) -> None:
    build, folder = _start(tmp_path / "out")
    try:
        with pytest.raises(D3tomError, match=f"being built by another process, number {build.pid}"):
            sweep(tmp_path / "out")
        assert sweep(tmp_path / "other") == []
        assert (folder / NEW_FOLDER / "front.onnx").read_bytes() == b"half"
    finally:
        build.communicate()
    assert len(sweep(tmp_path / "out")) == 1


def test_one_of_two_builds_that_begin_together_wins(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(D3tomError, match="exists"):
        _build(output, lambda late: _build(output, lambda first: (first / "config.json").write_text("first")))
    assert (output / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _elsewhere(folder: Path) -> Path:
    """``folder`` under the name that a build on another machine would have given it."""
    host = output_module._host()
    return folder.rename(folder.with_name(folder.name.replace(host, "0123abcd")))


def _age(folder: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))


@pytest.mark.parametrize("hours", [-5, 0, ABANDONED_HOURS - 1])
def test_what_may_be_at_work_on_another_machine_is_named(tmp_path: Path, hours: float) -> None:
    """Its lock may not be seen here. A clock that runs backwards removes nothing either."""
    folder = _elsewhere(_die_in(tmp_path / "out"))
    _age(folder, hours)
    (told,) = sweep(tmp_path / "out")
    assert str(folder) in told
    assert "another machine" in told
    assert (folder / NEW_FOLDER / "front.onnx").is_file()


def test_what_nobody_touched_for_a_day_is_removed(tmp_path: Path) -> None:
    _age(_elsewhere(_die_in(tmp_path / "out")), ABANDONED_HOURS + 1)
    earlier = tmp_path / ".out.partial-123-0a1b2c3d"  # as earlier versions left it, without a lock
    earlier.mkdir()
    (earlier / "back.onnx").write_text("")
    _age(earlier, ABANDONED_HOURS + 1)
    assert len(sweep(tmp_path / "out")) == 2
    assert list(tmp_path.iterdir()) == []


def test_one_recent_file_keeps_a_folder_of_another_machine(tmp_path: Path) -> None:
    folder = _elsewhere(_die_in(tmp_path / "out"))
    _age(folder, ABANDONED_HOURS + 1)
    os.utime(folder / NEW_FOLDER / "front.onnx")
    sweep(tmp_path / "out")
    assert folder.is_dir()


def _users_file(folder: Path) -> None:
    (folder / NEW_FOLDER / "thesis.tex").write_text("years of work")


def _users_link(folder: Path) -> None:
    (folder / NEW_FOLDER / "model.safetensors").symlink_to("/etc/passwd")


def _users_folder_link(folder: Path) -> None:
    (folder / "weights").symlink_to(folder.parent)


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / NEW_FOLDER / "back.onnx")


@pytest.mark.parametrize("adds", [_users_file, _users_link, _users_folder_link, _pipe])
def test_a_folder_with_anything_else_in_it_stays(tmp_path: Path, adds: Callable[[Path], None]) -> None:
    folder = _die_in(tmp_path / "out")
    adds(folder)
    _age(folder, 1000)
    before = sorted(folder.rglob("*"))
    (told,) = sweep(tmp_path / "out")
    assert "which no build writes: it stays" in told
    assert sorted(folder.rglob("*")) == before


def test_only_folders_with_a_builds_name_are_looked_at(tmp_path: Path) -> None:
    host = output_module._host()
    names = [".out.partial-notes", f".outer.partial-{host}-1-0a1b2c3d", f"out.partial-{host}-1-0a1b2c3d", ".out."]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "front.onnx").write_text("")
        _age(tmp_path / name, 1000)
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / f".out.partial-{host}-2-0a1b2c3d").symlink_to(target)
    (tmp_path / f".out.partial-{host}-3-0a1b2c3d").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    assert sweep(tmp_path / "out") == []
    assert sorted(tmp_path.rglob("*")) == before
    assert sweep(tmp_path / "missing" / "deep" / "out") == []


def test_every_file_of_a_bundle_bears_a_name_that_the_sweep_knows(bundle: Bundle, tiny_bundle: Bundle) -> None:
    for folder in (bundle.folder, tiny_bundle.folder):
        names = list(output_module._files(folder))
        assert [name for name in names if not output_module._is_written(folder, name)] == []


def test_a_trial_of_links_that_was_killed_is_swept(tmp_path: Path) -> None:
    """It works in the nearest folder there is: those above the output are not made for it."""
    output = tmp_path / "deep" / "out"
    code = (
        "import os, sys; from pathlib import Path; from d3tom_export.bundle.output import work_folder\n"
        "with work_folder(Path(sys.argv[1]), 'out') as trial:\n"
        "    (trial / 'model.safetensors').write_text(''); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert len(list(tmp_path.iterdir())) == 1
    assert len(sweep(output)) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder_of_old", [OLD_FOLDER, "-replaced"])
def test_a_bundle_that_was_being_replaced_comes_back(copy: Path, folder_of_old: str) -> None:
    """Killed between the two renames, on a file system that cannot exchange folders; or by an earlier version."""
    folder = _die_in(copy, "force")
    old = folder / OLD_FOLDER
    if folder_of_old != OLD_FOLDER:
        old = copy.with_name(f".{copy.name}.partial-{os.getpid()}-0a1b2c3d-replaced")
    copy.rename(old)
    told = sweep(copy)
    assert any(f"{copy}, which a killed build was replacing, is back in its place." in note for note in told)
    load_bundle(copy)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_what_is_left_of_a_replaced_bundle_does_not_come_back(copy: Path) -> None:
    folder = _die_in(copy, "force")
    shutil.copytree(copy, folder / OLD_FOLDER)
    (folder / OLD_FOLDER / "back.onnx").unlink()
    shutil.rmtree(copy)
    sweep(copy)
    assert list(copy.parent.iterdir()) == []


def test_an_interrupt_between_two_renames_puts_the_bundle_back(
    copy: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_exchange(monkeypatch)
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).name == OLD_FOLDER:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(copy, force=True) as partial:
        _fill(partial, bundle)
    load_bundle(copy)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_bundle_with_a_killed_builds_engines_is_still_ours(copy: Path) -> None:
    """Its manifest does not list them yet."""
    host = copy / "engines" / ".partial-1-0a1b2c3d" / "tensorrt-rtx-sm89-fp16"
    host.mkdir(parents=True)
    for name in ("front.plan", "front.json", "front.layers.json"):
        (host / name).write_text("")
    (copy / "front.fp16-plugin.onnx").write_text("")
    (copy / f".{MANIFEST_FILE}.0a1b2c3d.partial").write_text("")
    check_output_folder(copy, force=True)
    (host / "notes.txt").write_text("mine")
    with pytest.raises(D3tomError, match="holds files that no build wrote"):
        check_output_folder(copy, force=True)


def test_a_link_to_a_folder_is_no_file_of_ours(copy: Path, tmp_path: Path) -> None:
    (copy / "more").symlink_to(tmp_path)
    with pytest.raises(D3tomError, match="holds files that no build wrote"):
        check_output_folder(copy, force=True)


def test_a_bundle_that_gets_engines_is_not_replaced(copy: Path, bundle: Bundle) -> None:
    with (
        locked(copy),
        pytest.raises(D3tomError, match="building engines"),
        new_folder(copy, force=True) as partial,
    ):
        _fill(partial, bundle)
    load_bundle(copy)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_build_swept_before_it_had_its_lock_takes_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of a folder and its lock another build may clear it away."""
    create, swept = output_module.create_locked, []

    def late(path: Path) -> int | None:
        if not swept:
            swept.append(sweep(tmp_path / "out"))
            assert not path.parent.exists()
        return create(path)

    monkeypatch.setattr(output_module, "create_locked", late)
    with work_folder(tmp_path, "out") as folder:
        assert (folder / LOCK_FILE).exists()
    assert "was removed" in swept[0][0]
    assert list(tmp_path.iterdir()) == []


def test_listed_files_are_taken_from_the_manifest_before_they_change(copy: Path) -> None:
    output_module.unlist(copy, lambda name: name == "generation_config.json")
    assert "generation_config.json" not in json.loads((copy / MANIFEST_FILE).read_text())["files"]
    (copy / "generation_config.json").unlink()
    load_bundle(copy)


def test_what_is_kept_lies_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "bundle" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for output, expected in (
        (Path("."), tmp_path / "bundle" / ".inner.quantizing"),
        (Path(".."), tmp_path / ".bundle.quantizing"),
        (Path("other"), inner / ".other.quantizing"),
    ):
        assert kept_folder(output) == expected
    for length in (244, 255):
        kept = kept_folder(Path("n" * length))
        kept.mkdir()  # file systems take 255 bytes
        assert kept.parent == inner
