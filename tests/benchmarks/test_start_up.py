"""The start-up benchmark: parts of a start, and that a later one is told from a first."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from benchmarks.start_up import PARTS, STARTS, _started, run, start, table
from d3tom_export.bundle.folder import Bundle


def test_a_start_has_its_parts(bundle: Bundle) -> None:
    assert list(start(bundle.folder, "auto", True, False, time.time())) == list(PARTS)
    assert list(start(bundle.folder, "full", True, True, time.time())) == ["start", "open"]
    assert list(start(bundle.folder, "auto", False, False, time.time())) == ["start", "open"]  # engines are not here


def test_a_first_opening_forgets_what_was_known(bundle: Bundle, tmp_path: Path) -> None:
    copy, cache = Path(shutil.copytree(bundle.folder, tmp_path / "copy")), tmp_path / "cache"
    for path in filter(Path.is_file, copy.rglob("*")):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    assert set(_started(copy, cache, "first opening", True)) == {"start", "open"}
    (record,) = (cache / "d3tom-export" / "verified").iterdir()
    noted = record.stat().st_ino
    _started(copy, cache, "later opening", True)
    assert record.stat().st_ino == noted  # nothing was hashed, so nothing was written


@pytest.mark.slow  # builds a bundle, which other tests see from inside
def test_every_kind_of_start_is_measured(tmp_path: Path) -> None:
    found = run("lavida-tiny", 1, False, tmp_path)
    assert [row["start"] for row in found] == ["later opening, the first after the build", *STARTS]
    assert len({line.count("|") for line in table(found).splitlines()}) == 1
