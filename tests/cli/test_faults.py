"""The command line's own faults: streams that are closed, terminals that are, results beside links of others."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.cli import common
from d3tom_export.errors import D3tomError
from tests.conftest import Invoke

COMMAND = [sys.executable, "-m", "d3tom_export"]


def _shell(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a line of bash whose "$@" is ``d3tom-export`` with ``arguments``."""
    return subprocess.run(
        ["bash", "-c", script, "bash", *COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def _is_clean(text: str) -> bool:
    return "Traceback" not in text and "defect" not in text and "Exception ignored" not in text


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_closed_streams_do_not_matter(bundle: Bundle, closed: str) -> None:
    done = _shell(f'"$@" {closed}', "inspect", bundle.folder)
    assert done.returncode == 0
    assert "uncached" in done.stdout


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_not_written_to_files(bundle: Bundle, tmp_path: Path, closed: str) -> None:
    """The first file that is opened would get the stream's number, and what is printed."""
    copy = shutil.copytree(bundle.folder, tmp_path / "copy")
    done = _shell(f'"$@" {closed}', "inspect", copy, "--json", tmp_path / "result.json")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads((tmp_path / "result.json").read_text())["schema_version"]
    load_bundle(copy)


@pytest.mark.parametrize(
    ("arguments", "where", "says"),
    [
        (["inspect", "{}"], ">/dev/full", "No space left on device"),
        (["inspect", "{}", "--json", "-"], ">/dev/full", "No space left on device"),
        (["inspect", "{}", "--json", "-"], ">&-", "Standard output is closed"),
        (["--help"], ">/dev/full", "No space left on device"),
        (["inspect", "--help"], ">/dev/full", "No space left on device"),
        (["inspect", "{}/missing"], "2>/dev/full", ""),
        (["inspect", "{}/missing"], "2>&-", ""),
    ],
)
def test_output_that_nobody_takes_is_a_failure(bundle: Bundle, arguments: Sequence[str], where: str, says: str) -> None:
    done = _shell(f'"$@" {where}', *(argument.format(bundle.folder) for argument in arguments))
    assert done.returncode == 1
    assert says in done.stderr
    assert _is_clean(done.stderr)
    assert len(done.stderr.splitlines()) <= 1


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "{}"], ["inspect", "{}", "--json", "-"]])
def test_a_reader_that_has_enough_is_no_error_to_speak_of(bundle: Bundle, arguments: Sequence[str]) -> None:
    given = [argument.format(bundle.folder) for argument in arguments]
    for script in ('"$@" | true; exit ${PIPESTATUS[0]}', '"$@" | head -1; exit ${PIPESTATUS[0]}'):
        done = _shell(script, *given)
        assert done.returncode in (0, 1)
        assert done.stderr == ""


_TALKS = """
import time
import click
from d3tom_export.cli import common, main

@click.command("build", cls=common.Command)
def command() -> None:
    progress = common.ConsoleProgress()
    for done in range(4):
        time.sleep(0.1)
        progress(f"step {done}", done, 4)
        click.echo("a note", err=True)
    click.echo("done")

main.main = lambda prog_name: command.main([], prog_name=prog_name)
main.entry()
"""


@pytest.mark.parametrize("reader", ["2> >(true)", "2> >(head -1 >&2)", "2>/dev/full", "2>&-"])
def test_messages_that_nobody_reads_do_not_stop_the_work(reader: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f'"$@" {reader}', "bash", sys.executable, "-c", _TALKS], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "done\n")


_WORK = """
import sys, time
from pathlib import Path
import click
from d3tom_export.cli import common, main
from d3tom_export.bundle.output import new_folder

@click.command("build", cls=common.Command)
def command() -> None:
    with new_folder(Path(sys.argv[1]), False) as partial:
        (partial / "front.onnx").write_bytes(b"half")
        print("ready", flush=True)
        time.sleep(60)

main.main = lambda prog_name: command.main([], prog_name=prog_name)
main.entry()
"""


def _obey_signals() -> None:
    """Whoever runs the tests may ignore some: shells do for what they run in the background."""
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _end(output: Path, *signals: int, before: str = "") -> subprocess.Popen[str]:
    """A command in the midst of filling an output folder, ended by signals."""
    process = subprocess.Popen(
        ["bash", "-c", before + 'exec "$@"', "bash", sys.executable, "-c", _WORK, str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_obey_signals,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
    return process


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGHUP],
        [signal.SIGTERM],
        [signal.SIGINT],
        [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM],  # as a shell and the kernel do when a terminal closes
    ],
)
def test_whatever_ends_a_command_it_cleans_up(tmp_path: Path, signals: Sequence[int]) -> None:
    process = _end(tmp_path / "out", *signals)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Aborted" in told
    assert _is_clean(told)
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_is_to_survive_its_terminal_does(tmp_path: Path) -> None:
    """``nohup`` has its signal ignored."""
    process = _end(tmp_path / "out", signal.SIGHUP, before="trap '' HUP; ")
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_signals_are_given_back(invoke: Invoke) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)]
    invoke("doctor")
    assert [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)] == before


def test_results_of_two_processes_do_not_meet(tmp_path: Path) -> None:
    """Nor does a file in the way matter, or one that a killed process left."""
    target = tmp_path / "result.json"
    (tmp_path / ".result.json.partial").symlink_to(tmp_path / "victim")  # the name that was once written to
    left = tmp_path / ".result.json.0a1b2c3d.partial"
    left.write_text("half")
    theirs = tmp_path / ".result.json.notes.partial"
    theirs.write_text("mine")
    link = tmp_path / ".result.json.0a1b2c3e.partial"
    link.symlink_to(theirs)
    common.write_json(str(target), {"passed": True})
    assert json.loads(target.read_text()) == {"passed": True}
    assert not (tmp_path / "victim").exists()
    assert not left.exists()
    assert theirs.read_text() == "mine"
    assert link.is_symlink()


def test_a_link_that_another_user_laid_is_not_followed(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make files of other users")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    link, own = tmp_path / "result.json", tmp_path / "own.json"
    link.symlink_to(victim)
    os.lchown(link, 65534, 65534)
    own.symlink_to(link)
    for path in (link, own):
        with pytest.raises(D3tomError, match="link of another user"):
            common.write_json(str(path), {})
    assert victim.read_text() == "mine"


def _full(error: int) -> Callable[..., None]:
    def replace(path: Path, content: bytes) -> None:
        raise OSError(error, os.strerror(error), str(path))

    return replace


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_result_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr("d3tom_export.trust.replace.replace_file", _full(number))
    with pytest.raises(D3tomError, match=r"cannot be written.*Give --json another path"):
        common.write_json(str(tmp_path / "result.json"), {})
    assert list(tmp_path.iterdir()) == []
