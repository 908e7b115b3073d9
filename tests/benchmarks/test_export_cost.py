"""The export's benchmark: one build of the smallest geometry, seen from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import export_cost
from benchmarks.export_cost import run, table


@pytest.mark.slow  # half a minute, for a build that other tests see from inside
def test_a_build_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_cost, "LOOP_OPTIONS", {"uncached": ()})
    (row,) = run(["lavida-tiny"], 1, tmp_path)
    assert row["geometry"] == "lavida-tiny"
    assert row["weights_bytes"] > 4e6
    assert 0 < row["written_bytes"] < row["weights_bytes"]
    assert row["peak_memory_bytes"] > 2e8  # torch alone takes as much
    assert row["seconds"]["median"] > 1
    assert [path.name for path in tmp_path.iterdir()] == ["lavida-tiny"]
    assert "| lavida-tiny | uncached |" in table([row])


def test_a_failed_build_is_told(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"failed: .*not a folder"):
        export_cost.build(tmp_path / "nowhere", "uncached", tmp_path / "bundle")
