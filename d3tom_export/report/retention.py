"""The figure of an evaluation: what is right over the visual tokens kept, a line where the ratio alone differs.

matplotlib draws it, imported only when there is something to draw.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from d3tom_export.report.data import UNMERGED, Setting
from d3tom_export.report.figures import (
    NONE,
    Drawing,
    Table,
    legend_label,
    legend_words,
    new_figure,
    percent,
    share_axis,
)
from d3tom_export.report.svg import SERIES, inline_svg, page_style

_MARKERS = ("o", "s", "D", "^", "v", "P")
_MOST_LINES = len(SERIES) * len(_MARKERS)
"""That differ in colour or marker."""
_INSIDE = 26
"""Characters of lines' names, at most, of a legend that lies in the picture; others lie below it."""
_WIDE, _LONGEST = 46, 92
"""Characters of a line of a legend below the picture, and of a name in it."""
_LINE_HEIGHT = 0.2
"""Of that legend, in inches."""


@dataclass(frozen=True)
class _Line:
    name: str
    rows: list[Setting]


def _names(settings: Sequence[Setting]) -> list[str]:
    """Of each setting: policy and loop, and of all else but the ratio what tells it from others of these."""
    several = len({setting.layer for setting in settings if setting.select != UNMERGED}) > 1
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for setting in settings:
        groups.setdefault((setting.select, setting.loop), []).append(dict(setting.details))
    telling = {key: _telling(group) for key, group in groups.items()}
    names = []
    for setting in settings:
        details = dict(setting.details)
        words = [legend_words(setting.select), legend_words(setting.loop)]
        words += [f"layer {setting.layer}"] if several and setting.select != UNMERGED else []
        words += [f"{name} {details.get(name, NONE)}" for name in telling[setting.select, setting.loop]]
        names.append(", ".join(words))
    return names


def _telling(group: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of the details that differ, but those that say no more than the ones before: a plan's steps, say."""
    found: list[str] = []
    kinds = 1
    for name in dict.fromkeys(name for each in group for name in each):
        more = len({tuple(each.get(known) for known in (*found, name)) for each in group})
        if more > kinds:
            found.append(name)
            kinds = more
    return found


def _lines(settings: Sequence[Setting]) -> list[_Line]:
    """Settings that are joined by a line, each with the same loop and rule unmerged; what ends no line stands alone."""
    names = _names(settings)
    whole = [setting for setting in settings if setting.select == UNMERGED]
    merged: dict[object, list[Setting]] = {}
    called: dict[object, str] = {}
    for name, setting in zip(names, settings, strict=True):
        if setting.select != UNMERGED:
            alike = (setting.select, setting.loop, setting.layer, setting.details)
            merged.setdefault(alike, []).append(setting)
            called[alike] = name
    lines, joined = [], []
    for what, rows in merged.items():
        ends = [each for each in whole if each.loop == rows[0].loop and set(each.details) <= set(rows[0].details)]
        lines.append(_Line(called[what], rows + ends[:1]))
        joined += ends
    for name, setting in zip(names, settings, strict=True):
        if setting.select == UNMERGED and setting not in joined:
            lines.append(_Line(name, [setting]))
            joined.append(setting)
    return lines


def _score(setting: Setting) -> float:
    return setting.exact_match if setting.anls is None else setting.anls


def _interval(setting: Setting) -> tuple[float, float]:
    """Of the score; the score itself where none is known."""
    interval = setting.interval if setting.anls is None else setting.anls_interval
    return interval or (_score(setting), _score(setting))


def retention_figure(settings: Sequence[Setting]) -> Drawing:
    """The score over the share of visual tokens kept: the paper's figure 1.

    The score is ANLS where the settings have it, which is what was compared then; else the share of right answers.
    """
    anls = settings[0].anls is not None
    lines = _lines(settings)
    drawn, left = lines[:_MOST_LINES], len(lines[_MOST_LINES:])
    texts = [_legend_text(line.name) for line in drawn]
    below = len(drawn) > len(SERIES) or any(len(line.name) > _INSIDE for line in drawn)
    height = sum(text.count("\n") + 1 for text in texts) * _LINE_HEIGHT if below else 0.0
    with page_style():
        figure = new_figure(3.4 + height)
        axes = figure.add_subplot()
        for number, (line, text) in enumerate(zip(drawn, texts, strict=True)):
            ordered = sorted(line.rows, key=lambda row: row.mean_kept)
            scores = [_score(row) for row in ordered]
            low = [max(0.0, _score(row) - _interval(row)[0]) for row in ordered]
            high = [max(0.0, _interval(row)[1] - _score(row)) for row in ordered]
            axes.errorbar(
                [row.mean_kept for row in ordered],
                scores,
                yerr=[low, high],
                color=SERIES[number % len(SERIES)],
                marker=_MARKERS[(number + number // len(SERIES)) % len(_MARKERS)],
                markersize=5,
                linewidth=2,
                elinewidth=1,
                capsize=2,
                label=text,
            )
        axes.set_xlabel("visual tokens kept, mean over steps")
        axes.set_ylabel("ANLS, mean" if anls else "answers that are right")
        axes.set_xlim(0, 1.03)
        axes.set_ylim(0, 1.03)
        share_axis(axes, "x")
        share_axis(axes)
        if below:
            figure.legend(loc="outside lower center")
        else:
            axes.legend(loc="lower right")
        return Drawing(
            inline_svg(figure, "retention"), "retention", _told(settings, anls, left), _table(settings, anls)
        )


def _legend_text(name: str) -> str:
    """A line's name, over several lines of a legend where it is long."""
    return "\n".join(legend_label(line, _WIDE) for line in textwrap.wrap(legend_words(name, _LONGEST), _WIDE))


def _told(settings: Sequence[Setting], anls: bool, left: int) -> str:
    """What the figure shows, in words."""
    best = max(settings, key=_score)
    fewest = min(settings, key=lambda row: row.mean_kept)

    def scored(row: Setting) -> str:
        share = percent(_score(row), 1)
        return f"has an ANLS of {share}" if anls else f"answers {share} right"

    of = "ANLS" if anls else "share of right answers"
    told = "" if fewest.retention is None else f", {percent(fewest.retention)} of the {of} of the unmerged model"
    more = "" if not left else f" {left} more lines are in the table alone."
    return (
        f"Chart of {len(settings)} settings: the {of} over the share of visual tokens kept. The best {scored(best)}, "
        f"keeping {percent(best.mean_kept)} ({best.select}, {best.loop}); the one that keeps fewest, "
        f"{percent(fewest.mean_kept)}, {scored(fewest)}{told}.{more}"
    )


def _table(settings: Sequence[Setting], anls: bool) -> Table:
    named = sorted(
        zip(_names(settings), settings, strict=True),
        key=lambda each: (each[1].select, each[1].loop, each[0], each[1].mean_kept),
    )
    head = ["setting", "layer", "ratio", "kept", "exact match", "95\u00a0% interval"]
    head += ["ANLS", "95\u00a0% interval of ANLS"] if anls else []
    head += [f"retention of {'ANLS' if anls else 'exact match'}", "steps"]
    rows = []
    for name, row in named:
        entries = [
            name,
            NONE if row.layer is None else str(row.layer),
            NONE if row.ratio is None else f"{row.ratio:g}",
            percent(row.mean_kept, 1),
            percent(row.exact_match, 1),
            f"{percent(row.interval[0], 1)} to {percent(row.interval[1], 1)}",
        ]
        if anls:
            low, high = row.anls_interval or (None, None)
            entries += [percent(row.anls, 1), f"{percent(low, 1)} to {percent(high, 1)}"]
        rows.append([*entries, percent(row.retention, 1), f"{row.steps:.3g}"])
    return Table(f"{'Scores' if anls else 'Right answers'}, by setting", head, rows)
