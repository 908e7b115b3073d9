"""The load benchmark: every request is asked, and counted, whole and streamed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.serve_load import Asked, bodies, load, row, served, table, worked
from d3tom_export.bundle.folder import Bundle


def test_a_row_counts_what_was_not_answered() -> None:
    found = [Asked(1.0, None, 200), Asked(3.0, 0.5, 200), Asked(0.1, None, 429)]
    counted = row(2, 4.0, found, 1.5)
    assert (counted["requests"], counted["not_answered"], counted["requests_per_second"]) == (3, 1, 0.5)
    assert (counted["median"], counted["p95"], counted["first_text"]) == (2.0, 3.0, 0.5)
    assert table([counted]).splitlines()[-1] == "| 2 | 3 | 1 | 0.5 | 2.00 | 3.00 | 0.50 | 0.500 |"


@pytest.mark.slow  # a process of its own
def test_a_server_is_asked(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with served(tiny_bundle.folder, ["--no-kv-cache"], tmp_path) as told:
        asked = bodies(tiny_bundle.folder, told["model"])[:12]
        seconds, found = asyncio.run(load(told["url"], asked, 8))
        work = worked(told["url"])
    assert [each.status for each in found] == [200] * 12
    assert sum(each.first is not None for each in found) == 6
    counted = row(8, seconds, found, work)
    assert (counted["not_answered"], counted["work"] > 0) == (0, True)
