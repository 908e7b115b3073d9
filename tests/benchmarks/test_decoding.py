"""benchmarks.decoding: that all of it runs, and what it compares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import decoding
from d3tom_export.bundle.folder import Bundle

pytest.importorskip("matplotlib", reason="the picture needs the extra `plots`")


@pytest.mark.slow
def test_the_release_and_every_combination_answer_the_same_scenes(tiny_bundle: Bundle, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        decoding.main,
        [
            str(tiny_bundle.folder),
            *("--samples", "1", "--commit", "frechet", "--commit", "threshold"),
            *("--figure", str(tmp_path / "front.svg"), "--json", str(tmp_path / "rows.json")),
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    rows = {row["combination"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    planned = ["uncached", "uncached + D3ToM", "cached", "cached + D3ToM"]
    rules = [f"{label}, {rule}" for rule in ("frechet", "threshold") for label in planned]
    assert list(rows) == [*(f"release: {label}" for label in planned), *planned, *rules]
    released = rows["release: uncached"]
    assert released["speedup"]["median"] == 1.0
    assert released["steps"] == 16
    for label in planned:  # the same answers, but for the steps that ours leave out
        assert rows[label]["exact_match"] == rows[f"release: {label}"]["exact_match"]
        assert rows[label]["steps"] <= 16
        assert label in result.output
    assert (tmp_path / "front.svg").read_text().count("release: ") <= 1  # beaten by ours, so hardly on the front
