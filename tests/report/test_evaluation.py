"""What `evaluate --json` wrote, or somebody else did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.errors import D3tomError
from d3tom_export.report.data import UNMERGED
from d3tom_export.report.evaluation import read_settings
from tests.report.conftest import evaluation_rows


def _file(folder: Path, value: Any) -> Path:
    path = folder / "evaluation.json"
    path.write_text(json.dumps(value))
    return path


def test_rows_are_read_whatever_else_they_have(tmp_path: Path) -> None:
    rows = evaluation_rows()
    unmerged = dict.fromkeys(("layer", "ratio", "select", "retention"))
    settings = read_settings(_file(tmp_path, {"model": "a", "rows": [*rows, rows[0] | unmerged]}))
    assert len(settings) == 7
    assert (settings[1].select, settings[1].ratio, settings[1].interval) == ("decider", 0.5, (0.85, 0.92))
    assert (settings[6].select, settings[6].layer, settings[6].retention) == (UNMERGED, None, None)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "found none"),
        ({"rows": []}, "found 0"),
        ({"rows": "many"}, "found none"),
        ({"rows": [3]}, "object"),
        ({"rows": [{}]}, "loop"),
        ({"rows": [evaluation_rows()[0] | {"exact_match": 2}]}, "exact_match"),
        ({"rows": [evaluation_rows()[0] | {"interval": [0.5]}]}, "interval"),
        ({"rows": [evaluation_rows()[0] | {"select": "x" * 101}]}, "select"),
        ({"rows": evaluation_rows() * 400}, "found 2400"),
    ],
)
def test_other_files_are_refused_in_one_paragraph(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(D3tomError, match=words) as caught:
        read_settings(_file(tmp_path, value))
    assert "evaluate BUNDLE --json FILE" in str(caught.value)
