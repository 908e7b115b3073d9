"""The tabulator key, in real shells on a pseudo-terminal: commands, options and their values are completed."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from d3tom_export.cli.main import COMMANDS, main
from tests.conftest import Invoke

SHELLS = {
    "bash": ["--noprofile", "--norc", "-i"],
    "zsh": ["--no-rcs", "-i"],
    "fish": ["--no-config", "--interactive"],
}
SOURCED = {
    "bash": "source {script}",
    "zsh": "autoload -Uz compinit && compinit -u -d {folder}/dump && source {script}",
    "fish": "source {script}",
}
"""How an interactive shell without the user's own set-up takes a script in."""

TYPED = (
    ("d3tom-export vali", "validate"),
    ("d3tom-export build --quantize-acti", "--quantize-activations"),
    ("d3tom-export build --engine tensorrt-", "tensorrt-rtx"),
    ("d3tom-export evaluate --loop uncached,cac", "uncached,cached"),
)
"""What is typed before the key is pressed, and what must be shown then."""


class Terminal:
    """A shell, typed into."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._master, end = pty.openpty()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = os.environ | {"PATH": path, "TERM": "dumb", "HOME": str(folder), "PS1": "$ "}
        self._shell = subprocess.Popen(
            command,
            stdin=end,
            stdout=end,
            stderr=end,
            env=variables,
            cwd=folder,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # fish asks for a terminal of its own
        )
        os.close(end)
        self.shown = ""

    def type(self, keys: str) -> None:
        self.shown = ""
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read what is shown until ``text`` is."""
        until = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < until, f"no {text!r} in {self.shown!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                self.shown += os.read(self._master, 4096).decode(errors="replace")

    def close(self) -> None:
        self._shell.kill()
        self._shell.wait()
        os.close(self._master)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed here: apt-get install {name}")
    return name


@pytest.fixture
def terminal(shell: str, invoke: Invoke, tmp_path: Path) -> Iterator[Terminal]:
    """A shell that has taken in what `completion` printed."""
    script = tmp_path / "script"
    script.write_text(invoke("completion", shell).stdout)
    terminal = Terminal([shell, *SHELLS[shell]], tmp_path)
    try:
        terminal.type(SOURCED[shell].format(script=script, folder=tmp_path) + "; echo rea''dy\n")
        terminal.wait_for("ready")
        yield terminal
    finally:
        terminal.close()


def test_the_tabulator_key_completes(terminal: Terminal, shell: str) -> None:
    for typed, completed in TYPED:
        if shell == "fish" and "," in completed:
            continue  # click's script for fish cuts what it offers at commas
        terminal.type(typed + "\t")
        terminal.wait_for(completed)
        terminal.type("\x15")  # the line is taken back


def _completed(arguments: list[str], incomplete: str) -> set[str]:
    items = BashComplete(main, {}, "d3tom-export", "_D3TOM_EXPORT_COMPLETE").get_completions(arguments, incomplete)
    return {item.value for item in items}


def test_what_is_offered() -> None:
    assert _completed([], "") == set(COMMANDS)
    assert {"-h", "--help", "--version"} <= _completed([], "-")
    assert _completed(["tune"], "--max") == {"--max-flops", "--max-time", "--max-steps"}
    assert _completed(["completion"], "") == set(SHELLS)


def test_a_shell_that_is_not_known_is_a_usage_error(invoke: Invoke) -> None:
    result = invoke("completion", "csh")
    assert result.exit_code == 2
    assert "bash" in result.stderr


def test_completing_a_command_imports_none() -> None:
    """Every press of the key is a process: it must not import what it does not show."""
    script = (
        "import os, sys\nfrom d3tom_export.cli.main import main\n"
        "try:\n    main(prog_name='d3tom-export')\nexcept SystemExit:\n    pass\n"
        "print([name for name in sys.modules if name.startswith('d3tom_export.cli.') and name.endswith('_command')])"
    )
    asked = {"_D3TOM_EXPORT_COMPLETE": "bash_complete", "COMP_WORDS": "d3tom-export b", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["plain,build", "plain,batch", "plain,bench", "[]"]
