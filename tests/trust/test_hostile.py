"""The table of docs/trust.md, row by row: the user sees what it says, nothing is destroyed, nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from d3tom_export.bundle.folder import Bundle
from tests.conftest import Invoke

from .hostile import CASES, Scratch

PAGE = Path(__file__).parents[2] / "docs" / "trust.md"


def _rows() -> list[tuple[str, str, int]]:
    """(case, what the user sees, exit code) of the page's table of hostile cases."""
    section = PAGE.read_text(encoding="utf-8").split("## Hostile cases")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \| (\d) \|$", section, re.MULTILINE)
    return [(title, says, int(code)) for title, says, code in rows]


def test_page_and_cases_are_the_same() -> None:
    titles = [title for title, _, _ in _rows()]
    assert titles == list(CASES)


def _content(folder: Path) -> dict[str, bytes]:
    """Every regular file below ``folder`` that is small enough to compare."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 26
    }


@pytest.mark.parametrize(("title", "says", "code"), _rows(), ids=lambda value: value if isinstance(value, str) else "")
def test_row(
    title: str,
    says: str,
    code: int,
    checkpoint_folder: Path,
    bundle: Bundle,
    tmp_path: Path,
    invoke: Invoke,
) -> None:
    private = tmp_path / "private"
    private.write_text("PRIVATE-KEY")
    scratch = Scratch(
        Path(shutil.copytree(checkpoint_folder, tmp_path / "checkpoint")),
        Path(shutil.copytree(bundle.folder, tmp_path / "bundle")),
        private,
    )
    command = CASES[title](scratch)
    before = _content(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "bin").mkdir()
        called = tmp_path / "called"
        ghostscript = tmp_path / "bin" / "gs"
        ghostscript.write_text(f"#!/bin/sh\necho x >> {called}\nexit 1\n")
        ghostscript.chmod(0o755)
        patch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
        result = invoke(*command)
    assert result.exit_code == code, result.output
    message = result.stderr[result.stderr.index("Error: ") :].strip()
    assert message.isprintable(), message  # one line, and no command to the terminal
    for phrase in re.findall(r"“(.+?)”", says):
        assert phrase in message
    for mark in ("Traceback", "panicked", "This is a defect"):
        assert mark not in result.output
    assert "PRIVATE-KEY" not in result.output
    assert not called.exists(), "ghostscript was started"
    shutil.rmtree(tmp_path / "bin")
    assert _content(tmp_path) == before, "a file was changed, lost or left behind"
