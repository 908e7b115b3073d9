"""The rate of `batch`: all ways answer the same questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import batch_rate
from d3tom_export.bundle.folder import Bundle


@pytest.mark.slow
def test_ways_are_compared(tiny_bundle: Bundle, tmp_path: Path) -> None:
    found = batch_rate.measure(tiny_bundle.folder, 6, 2, [1, 2], False, ["--kv-cache"], tmp_path)
    assert [row["rows"] for row in found] == [2, 6, 6]
    assert all(row["seconds"] > (row["asking"] or 0) for row in found)
    lines = batch_rate.table(found).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
