"""A picture of right answers against time over every combination, with the Pareto front.

matplotlib draws it, from the optional extra ``plots``, imported only here and only when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d3tom_export.cost.figure import need_matplotlib, save

_COLOURS = {"uncached": "#D55E00", "cached": "#0072B2"}
"""Okabe and Ito's, which every kind of colour vision tells apart."""
_FAINT = 0.4
"""Opacity of what others answer, beside the backend that is measured."""
_MARKERS = {"unmerged": "o", "step": "s", "prefill": "D"}


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of ``points`` (seconds, share right) no other beats in both, fastest first.

    Of equal ones the first; another is beaten by one that is as good and faster, or as fast and better.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1], index))
    found: list[int] = []
    for index in order:
        if not found or points[index][1] > points[found[-1]][1]:
            found.append(index)
    return found


def draw_front(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the picture to ``path``, in the format of its ending.

    ``rows`` are those of :func:`~d3tom_export.cost.bench.summarize` with right answers known; ``title`` is a line under
    the heading. Raises :class:`D3tomError` where matplotlib is missing or the file cannot be written.
    """
    need_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    figure = Figure(figsize=(8.4, 5.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    points = [(row["answer_seconds"]["median"], row["exact_match"]) for row in rows]
    best = front(points)
    axes.plot(*zip(*(points[index] for index in best), strict=True), color="#999999", linewidth=1, zorder=1)
    for row, (seconds, share) in zip(rows, points, strict=True):
        colour, planned = _COLOURS[row["loop"]], row["commit"] == "plan"
        low, high = row["interval"]
        axes.errorbar(
            seconds,
            share,
            yerr=[[share - low], [high - share]],
            marker=_MARKERS[row["merging"]],
            markersize=8,
            color=colour,
            markerfacecolor="white" if planned else colour,
            linewidth=0.8,
            alpha=_FAINT if row["by"] else 1.0,
            zorder=2,
        )
    listed = []
    for number, index in enumerate(best, start=1):
        row, above = rows[index], number % 2
        axes.annotate(
            str(number), points[index], xytext=(0, 10 if above else -18), textcoords="offset points", ha="center"
        )
        listed.append(f"{number}: {row['combination']}, {row['steps']:.3g} steps, {points[index][1]:.1%}")
    # Points of a front may lie close together; its list does not.
    axes.text(
        0.02,
        0.02,
        "\n".join(["Pareto front", *listed]),
        transform=axes.transAxes,
        fontsize=8,
        va="bottom",
        bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        zorder=4,
    )
    axes.set_xscale("log", subs=(2, 5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("time of one answer from the prompt's embeddings on, seconds (median)")
    axes.set_ylabel("answers that are right, with 95 % intervals")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=True, which="both", linewidth=0.3)
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, label=loop) for loop, colour in _COLOURS.items()]
    merging = {"unmerged": "unmerged", "step": "merged at the steps", "prefill": "merged at the prefill"}
    handles += [
        Line2D([], [], marker=marker, linestyle="", color="#555555", markerfacecolor="white", label=merging[kind])
        for kind, marker in _MARKERS.items()
        if any(row["merging"] == kind for row in rows)
    ]
    rules = sorted({row["commit"] for row in rows} - {"plan"})
    handles.append(Line2D([], [], marker="o", linestyle="", color="#555555", markerfacecolor="white", label="plan"))
    handles += [Line2D([], [], marker="o", linestyle="", color="#555555", label=", ".join(rules))] if rules else []
    handles += [
        Line2D([], [], marker="o", linestyle="", color="#555555", alpha=_FAINT, label=f"{by}-style loop")
        for by in sorted({row["by"] for row in rows} - {""})
    ]
    handles.append(Line2D([], [], color="#999999", label="Pareto front"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.suptitle("What an answer costs, and how often it is right", fontweight="bold")
    axes.set_title(title, fontsize=9)
    save(figure, path)
