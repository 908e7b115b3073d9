"""The picture that ``tune --figure`` draws: retention against cost of all candidates, with the front and the choice.

matplotlib draws it, from the optional extra ``plots``, imported only here and only when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from d3tom_export.cost.figure import need_matplotlib, save
from d3tom_export.cost.pareto_figure import front
from d3tom_export.quality.tuning import Asked, Goal, Outcome

_COLOURS = {"uncached": "#D55E00", "cached": "#0072B2"}
"""Okabe and Ito's, which every kind of colour vision tells apart."""
_UNITS = {"flops": (1e9, "GFLOP of an answer, from the prompt's embeddings on (mean)"), "time": (1e-3, "ms (median)")}
_FEWEST = 8
"""Questions that a candidate which was left behind must have been asked to be drawn: fewer tell next to nothing."""
_LISTED = 10
"""Settings of the front that are named beside it."""


def draw_frontier(path: Path, title: str, outcome: Outcome, goal: Goal) -> None:
    """Write the picture to ``path``, in the format of its ending; ``title`` is a line under the heading.

    Finalists have bars, the 95 % intervals of their retention on the questions that were searched on; candidates that
    were left behind are faint, as the few questions that they were asked found them, eight at least. Raises
    :class:`D3tomError` where matplotlib is missing or the file cannot be written.
    """
    need_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    unit, label = _UNITS[goal.cost]
    figure = Figure(figsize=(8.4, 5.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for each in outcome.others:
        if each.questions < _FEWEST:
            continue
        axes.plot(each.cost / unit, each.retention, "o", color=_COLOURS[each.setting.loop], alpha=0.25, markersize=5)
    shown = [outcome.reference, *outcome.finalists]
    for each in shown:
        low, high = _ends(each)
        axes.errorbar(
            each.cost / unit,
            each.retention,
            yerr=[[each.retention - low], [high - each.retention]],
            marker="o" if each.setting.merge is None else "s",
            color=_COLOURS[each.setting.loop],
            markerfacecolor="white" if each.setting.merge is None else _COLOURS[each.setting.loop],
            linewidth=0.8,
            zorder=2,
        )
    best = [shown[at] for at in front([(each.cost, each.retention) for each in shown])]
    axes.plot([each.cost / unit for each in best], [each.retention for each in best], color="#999999", zorder=1)
    listed = []
    for number, each in enumerate(best[:_LISTED], 1):
        axes.annotate(
            str(number), (each.cost / unit, each.retention), xytext=(5, 5), textcoords="offset points", fontsize=9
        )
        listed.append(f"{number}: {each.setting.label}, {each.retention:.3f}")
    handles = [Line2D([], [], marker="s", linestyle="", color=colour, label=loop) for loop, colour in _COLOURS.items()]
    handles.append(Line2D([], [], marker="o", linestyle="", color="#555555", markerfacecolor="white", label="unmerged"))
    handles.append(Line2D([], [], marker="o", linestyle="", color="#555555", alpha=0.25, label="left behind"))
    handles.append(Line2D([], [], color="#999999", label="Pareto front"))
    if goal.min_retention is not None:
        axes.axhline(goal.min_retention, color="#009E73", linestyle="--", linewidth=1)
        handles.append(Line2D([], [], color="#009E73", linestyle="--", label=f"floor {goal.min_retention:g}"))
    if goal.max_cost is not None:
        axes.axvline(goal.max_cost / unit, color="#009E73", linestyle="--", linewidth=1)
        handles.append(Line2D([], [], color="#009E73", linestyle="--", label=f"budget {goal.max_cost / unit:g}"))
    if outcome.chosen is not None:
        chosen = outcome.chosen
        axes.plot(chosen.cost / unit, chosen.retention, "*", color="#CC79A7", markersize=16, zorder=3)
        handles.append(
            Line2D([], [], marker="*", linestyle="", color="#CC79A7", markersize=11, label="choice, as checked")
        )
    # Points of a front may lie close together; its list does not.
    axes.text(
        0.98,
        0.02,
        "\n".join(["Pareto front", *listed]),
        transform=axes.transAxes,
        fontsize=8,
        va="bottom",
        ha="right",
        bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        zorder=4,
    )
    axes.set_xscale("log", subs=(2, 5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(label)
    axes.set_ylabel("retention of the unmerged score, with 95 % intervals")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=True, which="both", linewidth=0.3)
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.suptitle("What merging costs, and what it keeps", fontweight="bold")
    axes.set_title(title, fontsize=9)
    save(figure, path)


def _ends(asked: Asked) -> Sequence[float]:
    """The interval around a retention, which holds it; an end that is not known is left at it."""
    interval = asked.comparison.retention_interval
    if interval is None:
        return (asked.retention, asked.retention)
    high = interval.high if interval.high < float("inf") else asked.retention
    return (min(interval.low, asked.retention), max(high, asked.retention))
