"""Figures as pieces of a page: no style of their own, text as text, the page's colours."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from d3tom_export.report import figures
from d3tom_export.report.data import UNMERGED, Report, Setting
from d3tom_export.report.figures import Drawing, duration, milliseconds, percent
from d3tom_export.report.retention import retention_figure


def _drawings(report: Report) -> list[Drawing]:
    assert report.redundancy is not None
    assert report.reductions is not None
    assert report.settings is not None
    held, heat = figures.held_figure(report.answers), figures.importance_figure(report.answers[0], "heat")
    assert held is not None
    assert heat is not None
    return [
        held,
        heat,
        figures.redundancy_figure(report.redundancy, report.layer),
        figures.reductions_figure(report.reductions),
        retention_figure(report.settings),
        figures.time_figure(report.answers),
    ]


def test_drawings_are_parts_of_a_page(made_up: Report) -> None:
    for drawing in _drawings(made_up):
        root = ElementTree.fromstring(drawing.svg)
        assert {"viewBox", "role", "aria-labelledby"} <= root.attrib.keys()
        assert not {"width", "height"} & root.attrib.keys()
        for node in root.iter():
            assert node.tag not in ("style", "script", "metadata")
            assert "style" not in node.attrib
        assert re.search(r">\s*[\w.]+[^<]*</text>", drawing.svg), "text is text"
        assert "#0102" not in drawing.svg, "a colour that is only a name"
        assert "var(--ink)" in drawing.svg
        ids = re.findall(r' id="([^"]+)"', drawing.svg)
        assert all(name.startswith(f"{drawing.name}-") for name in ids)
        assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', drawing.svg)) <= {
            pair for name in ids for pair in ((name, ""), ("", name))
        }
        assert all(len(row) == len(drawing.table.columns) for row in drawing.table.rows)


def test_what_is_said_of_a_figure_is_counted(made_up: Report) -> None:
    held, heat, alike, saved, right, time = _drawings(made_up)
    # Of the second step: tokens 1 and 6 of 0..7, which weigh as much as their numbers.
    assert "25 % of the visual tokens, get 25 % of the attention" in held.alt.replace("\u00a0", " ")
    assert "3 by 2 visual tokens" in heat.alt
    assert "get most have 25 % of the attention" in heat.alt.replace("\u00a0", " ")
    assert "save 40.0 %; the most is 70.0 %" in saved.alt.replace("\u00a0", " ")
    assert "125 ms to 250" in time.alt or "125 to 250 ms" in time.alt
    assert "50.0 % right" in right.alt.replace("\u00a0", " ")
    assert "At layer 1" in alike.alt
    assert held.table.rows == [["2", "25.0\u00a0%", "25.0\u00a0%"]]


def test_nobody_asked_nothing_drawn(made_up: Report) -> None:
    answer = made_up.answers[0]
    unasked = replace(answer, steps=[replace(step, importance=None) for step in answer.steps])
    assert figures.held_figure([unasked]) is None
    assert figures.importance_figure(unasked, "heat") is None


def test_a_line_for_every_policy_and_loop() -> None:
    settings = [
        Setting(loop, select, 2, ratio, 0.5, (0.4, 0.6), 0.9, 1 - ratio, 8)
        for loop in ("uncached", "cached")
        for select in ("decider", "random", "uniform", "fastv")
        for ratio in (0.5, 0.9)
    ]
    drawing = retention_figure(settings)
    assert len(drawing.table.rows) == 16
    assert "fastv, cached" in drawing.svg
    assert "layer" not in drawing.svg
    deeper = replace(settings[0], layer=3)
    unmerged = Setting("uncached", UNMERGED, None, 0.0, 0.55, (0.5, 0.6), None, 1.0, 8)
    drawing = retention_figure([unmerged, *settings, deeper])
    assert "decider, uncached, layer 3" in drawing.svg
    assert UNMERGED not in drawing.svg, "it ends every line of its loop"
    assert len(drawing.table.rows) == 18
    alone = retention_figure([unmerged])
    assert "unmerged, uncached" in alone.svg


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0012345, "1.23"), (0.0123, "12.3"), (0.123, "123"), (12.5, "12,500"), (0.0, "0.00")]
)
def test_milliseconds_have_three_digits(seconds: float, shown: str) -> None:
    assert milliseconds(seconds) == shown
    assert percent(None) == "—"
    assert duration(seconds) == (f"{shown}\u00a0ms" if seconds < 1 else "12.5\u00a0s")
