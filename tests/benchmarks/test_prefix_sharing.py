"""The benchmark of a shared prefix at tiny sizes: both ways are timed and answered, and told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import prefix_sharing
from benchmarks.prefix_sharing import _Asker, main, measure
from d3tom_export.bundle.folder import Bundle
from d3tom_export.prompt.samples import Sample
from tests.conftest import picture

SAMPLES = [Sample("What is it?", picture(60, 80, seed), "nothing") for seed in (1, 2)]


def test_both_ways_are_measured(sharing_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        _Asker, "text", lambda self, sample, *, shared: (asked.append(shared), "nothing" if shared else "much")[1]
    )
    row = measure(sharing_bundle, SAMPLES, rounds=3)
    assert sorted(asked) == [False, False, True, True]
    assert (row.merge_at, row.samples, row.right, row.shared_right, row.same) == ("step", 2, 0, 2, 0)
    assert (row.lost, row.gained) == (0, 2)
    assert 0 < row.shared_tokens < row.prompt_tokens
    assert row.milliseconds > 0
    assert row.shared_milliseconds > 0


def test_the_table_has_a_row_for_each_bundle(
    sharing_bundle: Bundle, sharing_prefill_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_sharing, "load_samples", lambda path, count: SAMPLES[:count])
    folders = [str(each.folder) for each in (sharing_bundle, sharing_prefill_bundle)]
    result = CliRunner().invoke(
        main, [*folders, "--samples", "1", "--rounds", "1", "--json", str(tmp_path / "rows.json")]
    )
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| step", "| prefill"]
    assert (tmp_path / "rows.json").read_text().count('"merge_at"') == 2
