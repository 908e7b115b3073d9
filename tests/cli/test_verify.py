"""``--verify``: which commands have it, and what it asks for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.trust import known_hashes
from tests.conftest import Invoke


def test_inspect_hashes_again_only_where_it_is_asked_to(
    bundle: Bundle, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    for path in filter(Path.is_file, copy.rglob("*")):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    digest, count = known_hashes.file_sha256_of, 0

    def counted(file):  # type: ignore[no-untyped-def]
        nonlocal count
        count += 1
        return digest(file)

    monkeypatch.setattr(known_hashes, "file_sha256_of", counted)
    counts = []
    for options in ([], [], ["--verify", "full"], ["--verify", "auto"]):
        count = 0
        assert invoke("inspect", copy, *options).exit_code == 0
        counts.append(count)
    assert counts == [counts[0], 0, counts[0], 0]
    assert counts[0] > len(bundle.manifest.stages)


@pytest.mark.parametrize(
    ("command", "default"), [("run", "auto"), ("bench", "auto"), ("inspect", "auto"), ("validate", "full")]
)
def test_the_help_says_what_is_hashed_by_default(invoke: Invoke, command: str, default: str) -> None:
    told = " ".join(invoke(command, "--help").stdout.partition("--verify [auto|full]")[2].split())
    assert told.startswith("Hash the bundle's files before they are read: auto, those that changed")
    assert told.partition("[default: ")[2].startswith(f"{default}]")


def test_a_recorded_run_has_no_files_to_verify(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("validate", "--case", tmp_path, "--verify", "full")
    assert result.exit_code == 2
    assert "--verify cannot change" in result.stderr
