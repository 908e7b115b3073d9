"""What `evaluate --json` wrote, or somebody else did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.config import CacheMergeConfig, GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.quality.settings import Setting as Tried
from d3tom_export.report import retention
from d3tom_export.report.data import UNMERGED, Setting
from d3tom_export.report.evaluation import read_evaluation
from d3tom_export.report.retention import retention_figure
from tests.report.conftest import evaluation_rows


def _file(folder: Path, value: Any) -> Path:
    path = folder / "evaluation.json"
    path.write_text(json.dumps(value))
    return path


def test_rows_are_read_whatever_else_they_have(tmp_path: Path) -> None:
    rows = evaluation_rows()
    unmerged = dict.fromkeys(("layer", "ratio", "select", "retention"))
    _, settings = read_evaluation(_file(tmp_path, {"model": "a", "rows": [*rows, rows[0] | unmerged]}))
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
        ({"metric": "f1", "rows": evaluation_rows()}, "metric"),
        ({"metric": "anls", "rows": evaluation_rows()}, "its metric is ANLS, and not every row has one"),
        ({"model": "x" * 1001, "rows": evaluation_rows()}, "model"),
        ({"rows": [evaluation_rows()[0] | {"merge": [1]}]}, "merge"),
    ],
)
def test_other_files_are_refused_in_one_paragraph(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(D3tomError, match=words) as caught:
        read_evaluation(_file(tmp_path, value))
    assert "evaluate BUNDLE --json FILE" in str(caught.value)


def _row(tried: Tried, right: float, kept: float, **more: Any) -> dict[str, Any]:
    """As `evaluate` writes one of a setting."""
    merge = tried.merge
    return {
        "setting": tried.label, "loop": tried.loop, "layer": None if merge is None else merge.layer,
        "ratio": 0.0 if merge is None else merge.ratio, "schedule": "none" if merge is None else merge.schedule,
        "select": None if merge is None else merge.select, "commit": tried.rule, "exact_match": right,
        "interval": [right, right], "retention": None, "mean_kept": kept, "steps": 8,
        "merge": None if merge is None else merge.to_json(), "generation": tried.generation.to_json(), **more,
    }  # fmt: skip


PLAN, SURE = GenerationConfig(48, steps=16), GenerationConfig(48, commit="threshold", threshold=0.9)
RELEASED = MergeConfig(2, 0.5)
OTHERS = {
    "schedule": replace(RELEASED, schedule="fixed"),
    "positions": replace(RELEASED, positions="original"),
    "deciders": replace(RELEASED, deciders="looking"),
    "merge at": replace(RELEASED, merge_at="prefill"),
    "aggregate": replace(RELEASED, aggregate="mean"),
    "remerge": replace(RELEASED, cache=CacheMergeConfig(remerge="per-block")),
}


@pytest.mark.parametrize("field", OTHERS)
def test_what_differs_is_a_line_of_its_own_and_named(tmp_path: Path, field: str) -> None:
    tried = [
        Tried("cached", replace(merge, ratio=ratio), PLAN)
        for merge in (RELEASED, OTHERS[field])
        for ratio in (0.5, 0.9)
    ]
    _, settings = read_evaluation(_file(tmp_path, {"rows": [_row(each, 0.5, 0.5) for each in tried]}))
    drawing = retention_figure(settings)
    names = {row[0] for row in drawing.table.rows}
    assert len(names) == 2
    assert all(f", {field} " in name and name.count(",") == 2 for name in names), names
    assert drawing.svg.count(f", {field} ") == 2


def test_commit_rules_are_lines_that_end_in_their_own_unmerged_model(tmp_path: Path) -> None:
    tried = [Tried("uncached", merge, rule) for rule in (PLAN, SURE) for merge in (None, RELEASED)]
    rows = [_row(each, 0.1 * number, 1.0 if each.merge is None else 0.5) for number, each in enumerate(tried, 1)]
    _, settings = read_evaluation(_file(tmp_path, {"rows": rows}))
    drawing = retention_figure(settings)
    assert [row[0] for row in drawing.table.rows] == [
        "decider, uncached, commit plan", "decider, uncached, commit threshold 0.9",
        "unmerged, uncached, commit plan", "unmerged, uncached, commit threshold 0.9",
    ]  # fmt: skip
    assert drawing.svg.count("decider, uncached, commit ") == 2
    assert "unmerged, uncached" not in drawing.svg, "each ends the line of its own rule"
    ((_, plan), (_, sure)) = [
        (line.name, [row.exact_match for row in line.rows]) for line in retention._lines(settings)
    ]
    assert (plan, sure) == ([0.2, 0.1], [0.4, pytest.approx(0.3)])


def test_the_metric_is_named(tmp_path: Path) -> None:
    rows = [_row(Tried("uncached", RELEASED, PLAN), 0.5, 0.5, anls=0.75, anls_interval=[0.7, 0.8], retention=0.96)]
    head = {
        "model": "/home/somebody/lavida", "data": "sets/docvqa", "questions": 64, "backend": "onnxruntime",
        "precision": "fp32",
    }  # fmt: skip
    evaluation, exact = read_evaluation(_file(tmp_path, {**head, "metric": "exact-match", "rows": rows}), ["lavida"])
    assert (evaluation.model, evaluation.data, evaluation.questions) == ("lavida", "docvqa", 64)
    assert not evaluation.other
    told = retention_figure(exact)
    assert "answers 50.0\u00a0% right, 96\u00a0% of the share of right answers" in told.alt
    assert "retention of exact match" in told.table.columns
    assert "ANLS" not in " ".join(told.table.columns)
    evaluation, close = read_evaluation(_file(tmp_path, {**head, "metric": "anls", "rows": rows}), ["lavida-r0.9"])
    assert (evaluation.metric, evaluation.other) == ("anls", True)
    told = retention_figure(close)
    assert "has an ANLS of 75.0\u00a0%, 96\u00a0% of the ANLS of the unmerged model" in told.alt
    shown = dict(zip(told.table.columns, told.table.rows[0], strict=True))
    assert (shown["exact match"], shown["ANLS"], shown["retention of ANLS"]) == (
        "50.0\u00a0%", "75.0\u00a0%", "96.0\u00a0%",
    )  # fmt: skip
    assert "ANLS, mean" in told.svg


def test_more_lines_than_can_be_told_apart_are_in_the_table_alone() -> None:
    settings = [Setting("uncached", f"policy {number}", 2, 0.5, 0.5, (0.4, 0.6), None, 0.5, 8) for number in range(40)]
    drawing = retention_figure(settings)
    assert "4 more lines are in the table alone" in drawing.alt
    assert len(drawing.table.rows) == 40


def test_long_names_are_cut_where_they_tell_nothing() -> None:
    settings = [
        Setting("uncached", f"{'$' * 60}{end}", 2, 0.5, 0.5, (0.4, 0.6), None, 0.5, 8, details=(("commit", rule),))
        for end in "ab"
        for rule in ("plan", "threshold 0.9")
    ]
    drawing = retention_figure(settings)
    assert len(retention._lines(settings)) == 4
    assert [row[0].partition("…")[2] for row in drawing.table.rows] == [
        ", uncached, commit plan", ", uncached, commit threshold 0.9",
    ] * 2  # fmt: skip
    assert drawing.svg.count("threshold 0.9") == 2
