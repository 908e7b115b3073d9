"""The figures of a report, each with a sentence that says what it shows and a table of the same numbers.

matplotlib draws them, from the optional extra ``report``; it is imported only when there is something to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from d3tom_export.cost.flop_figure import plot_reductions
from d3tom_export.errors import printable
from d3tom_export.report.data import Answer, Reductions, Redundancy, Step
from d3tom_export.report.svg import FONT_SIZE, INK, MUTED, PAPER, SERIES, WIDTH, inline_svg, page_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NONE = "—"
"""Where there is no number."""
_LONGEST_LABEL = 26
"""Characters of a line's name in a legend."""
_MOST_MAPS = 6
"""Steps whose importance is drawn side by side."""


@dataclass(frozen=True)
class Table:
    """The numbers of a figure."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    """The first entry of each heads its row."""


@dataclass(frozen=True)
class Drawing:
    """A figure as it stands on the page."""

    svg: str
    name: str
    """What ids of its parts begin with."""
    alt: str
    table: Table


def percent(share: float | None, digits: int = 0) -> str:
    """``share`` in percent; a dash where there is none."""
    return NONE if share is None else f"{100 * share:.{digits}f}\u00a0%"


def milliseconds(seconds: float) -> str:
    """``seconds`` in milliseconds, in three digits at least."""
    value = 1e3 * seconds
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """``seconds`` with the unit that suits them."""
    return f"{milliseconds(seconds)}\u00a0ms" if seconds < 1 else f"{seconds:,.3g}\u00a0s"


def legend_words(text: str, longest: int = _LONGEST_LABEL) -> str:
    """``text``, which may be a stranger's, in a line of at most so many characters."""
    shown = printable(text)
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def legend_label(text: str, longest: int = _LONGEST_LABEL) -> str:
    """``text``, which may be a stranger's, for matplotlib: short, and neither markup nor something to leave out."""
    shown = legend_words(text, longest)
    return (f" {shown}" if shown.startswith("_") else shown).replace("$", r"\$")


def new_figure(height: float, width: float = WIDTH) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def share_axis(axes: Axes, which: str = "y") -> None:
    from matplotlib.ticker import PercentFormatter

    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter(PercentFormatter(1.0, symbol="\u00a0%"))


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _means(values: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The mean of each place over sequences of unequal lengths, without what is None."""
    found: list[float | None] = []
    for place in range(max(map(len, values), default=0)):
        there = [each[place] for each in values if len(each) > place]
        known = [value for value in there if value is not None]
        found.append(sum(known) / len(known) if known else None)
    return found


def held_figure(answers: Sequence[Answer]) -> Drawing | None:
    """How much of the deciders' attention the kept tokens have, step by step; None where nobody knows."""
    seen = [answer for answer in answers if answer.visual_tokens]
    kept = _means([[step.keep / step.visual_tokens for step in answer.steps] for answer in seen])
    held = _means([[step.held_importance for step in answer.steps] for answer in seen])
    known = [place for place, share in enumerate(held) if share is not None]
    if not known:
        return None
    steps = [place + 1 for place in known]
    tokens, attention = ([values[place] or 0.0 for place in known] for values in (kept, held))
    with page_style():
        figure = new_figure(2.9)
        axes = figure.add_subplot()
        axes.plot(steps, attention, color=SERIES[0], linewidth=2, marker="o", markersize=4, label="attention they get")
        axes.plot(steps, tokens, color=SERIES[1], linewidth=2, marker="s", markersize=4, label="tokens kept")
        axes.set_ylim(0, max(*attention, *tokens) * 1.12)
        axes.set_xlabel("step")
        axes.legend()  # where it covers no line
        share_axis(axes)
        _whole_numbers(axes)
        mean = sum(attention) / len(attention), sum(tokens) / len(tokens)
        alt = (
            f"Line chart over steps {steps[0]} to {steps[-1]}. On average the kept tokens, {percent(mean[1])} of the "
            f"visual tokens, get {percent(mean[0])} of the attention that the deciders pay to visual tokens; at the "
            f"first merged step {percent(tokens[0], 1)} get {percent(attention[0])}, at the last {percent(tokens[-1])} "
            f"get {percent(attention[-1])}."
        )
        rows = [
            [str(step), percent(share, 1), percent(part, 1)]
            for step, share, part in zip(steps, tokens, attention, strict=True)
        ]
        table = Table("Kept tokens and their attention, by step", ["step", "tokens kept", "attention they get"], rows)
        return Drawing(inline_svg(figure, "held"), "held", alt, table)


def importance_figure(answer: Answer, name: str) -> Drawing | None:
    """Where the deciders look, at some steps of one answer: the paper's figure 3; None where nobody knows."""
    scored = [step for step in answer.steps if step.importance is not None and step.merged]
    if not scored or not answer.grids:
        return None
    places = sorted({round(place) for place in np.linspace(0, len(scored) - 1, min(_MOST_MAPS, len(scored)))})
    chosen = [scored[place] for place in places]
    grid = max(answer.grids, key=lambda each: each.rows * each.columns)
    index = [[grid.token(row, column) for column in range(grid.columns)] for row in range(grid.rows)]
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    height = rows * (WIDTH / columns * grid.rows / grid.columns + 0.3)
    with page_style():
        figure = new_figure(min(height, 2 * WIDTH))
        top = []
        for number, step in enumerate(chosen):
            assert step.importance is not None
            values = step.importance[index]
            axes = figure.add_subplot(rows, columns, number + 1)
            axes.imshow(values, cmap="cividis", interpolation="nearest", vmin=0)
            axes.set_title(f"step {step.number}", fontsize=FONT_SIZE - 0.5, pad=3)
            axes.set_axis_off()
            top.append(_share_of_top(step))
        first, last = chosen[0].number, chosen[-1].number
        shares = list(dict.fromkeys((percent(min(top)), percent(max(top)))))
        alt = (
            f"{len(chosen)} heat maps of {grid.columns} by {grid.rows} visual tokens, steps {first} to {last}: "
            f"brighter where the deciders of that step attend more. The tenth of the tokens that get most have "
            f"{' to '.join(shares)} of the attention."
        )
        lines = [
            [
                str(step.number),
                percent(_share_of_top(step), 1),
                str(step.keep),
                percent(step.held_importance, 1),
            ]
            for step in scored
        ]
        head = ["step", "attention on the top tenth", "tokens kept", "attention on them"]
        return Drawing(inline_svg(figure, name), name, alt, Table("Attention of the deciders, by step", head, lines))


def _share_of_top(step: Step) -> float:
    """The share of the importance that the most important tenth of the tokens has."""
    assert step.importance is not None
    values = np.sort(step.importance.astype(np.float64))[::-1]
    total = float(values.sum())
    return float(values[: max(1, len(values) // 10)].sum()) / total if total > 0 else 0.0


def redundancy_figure(redundancy: Redundancy, layer: int) -> Drawing:
    """How alike visual tokens are, over the layers: the paper's figure 2."""
    low, middle, high = (redundancy.quantile(share) for share in (0.1, 0.5, 0.9))
    layers = list(range(middle.shape[1]))
    with page_style():
        figure = new_figure(2.9)
        axes = figure.add_subplot()
        last = len(redundancy.steps) - 1
        styles = {0: ("-", "o"), 1: ("--", "s"), 2: (":", "D")}
        axes.fill_between(layers, low[last], high[last], color=SERIES[0], alpha=0.16, linewidth=0)
        for number, step in enumerate(redundancy.steps):
            line, marker = styles[number % 3]
            colour = SERIES[(2, 1, 0)[number % 3] if last else 0]
            axes.plot(
                layers,
                middle[number],
                line,
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=2,
                label=legend_label(step),
            )
        axes.axvline(layer, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        floor = float(low.min())
        axes.set_ylim(max(-1.0, floor - 0.12 * (1.0 - floor) - 1e-4), 1.0 + 0.04 * (1.0 - floor) + 1e-4)
        axes.annotate(
            "merged here",
            (layer, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if layer > layers[-1] / 2 else 5, 0),
            textcoords="offset points",
            ha="right" if layer > layers[-1] / 2 else "left",
            va="bottom",
            color=MUTED,
            fontsize=FONT_SIZE - 1,
        )
        axes.set_xlabel("layer")
        axes.set_ylabel("cosine similarity")
        _whole_numbers(axes)
        axes.legend(loc="lower right")
        here, apart = middle[last, layer], float((middle.max(axis=0) - middle.min(axis=0)).max())
        spread = f"The steps differ by at most {apart:.1g} anywhere. " if last else ""
        alt = (
            f"Line chart over {len(layers)} layers of how alike each visual token and the one most like it are. At "
            f"layer {layer}, where merging happens, half of the tokens have another with a cosine similarity of "
            f"{here:.3f} or more and nine in ten one of {low[last, layer]:.3f} or more; the median goes from "
            f"{middle[last, 0]:.3f} at layer 0 to {middle[last, -1]:.3f} at layer {layers[-1]} "
            f"({redundancy.steps[last]}). {spread}The band holds four tokens in five."
        )
        head = ["layer", *(f"median, {step}" for step in redundancy.steps), "10th percentile", "90th percentile"]
        rows = [
            [
                str(each),
                *(f"{middle[number, each]:.4f}" for number in range(len(redundancy.steps))),
                f"{low[last, each]:.4f}",
                f"{high[last, each]:.4f}",
            ]
            for each in layers
        ]
        table = Table(f"Similarity to the nearest other visual token; percentiles of the {redundancy.steps[last]}",
                      head, rows)  # fmt: skip
        return Drawing(inline_svg(figure, "redundancy"), "redundancy", alt, table)


def reductions_figure(reductions: Reductions) -> Drawing:
    """FLOPs that merging saves over l* and ratio: the paper's figure 5."""
    saved = reductions.saved
    with page_style():
        figure = new_figure(3.3)
        mark = (reductions.layer, reductions.ratio, reductions.here)
        axes = plot_reductions(figure, reductions.layers, reductions.ratios, saved, mark, fontsize=FONT_SIZE - 1.5)
        axes.grid(visible=False)
        figure.axes[-1].grid(visible=False)
        figure.axes[-1].set_ylabel("FLOPs saved")
        best = max((share, layer) for layer, row in enumerate(saved) for share in row)
        alt = (
            f"Map of the share of an answer's FLOPs that merging saves, over merge layers 0 to {reductions.layers[-1]} "
            f"and ratios {reductions.ratios[0]:g} to {reductions.ratios[-1]:g}. This bundle's layer "
            f"{reductions.layer} and ratio {reductions.ratio:g} save {percent(reductions.here, 1)}; the most is "
            f"{percent(best[0], 1)}, at layer {reductions.layers[best[1]]} and the highest ratio. Later layers and "
            f"lower ratios save less."
        )
        columns = sorted({*range(0, len(reductions.ratios), 5), len(reductions.ratios) - 1})
        head = ["layer", *(f"ratio {reductions.ratios[column]:g}" for column in columns)]
        rows = [
            [str(layer), *(percent(saved[number][column], 1) for column in columns)]
            for number, layer in enumerate(reductions.layers)
        ]
        return Drawing(
            inline_svg(figure, "flops"), "flops", alt, Table("FLOPs saved, by merge layer and ratio", head, rows)
        )


def time_figure(answers: Sequence[Answer]) -> Drawing:
    """Milliseconds of every step by stage, mean over the answers."""
    names = list(dict.fromkeys(name for answer in answers for step in answer.steps for name in step.stages))
    totals = [total or 0.0 for total in _means([[step.seconds for step in answer.steps] for answer in answers])]
    stages = {
        name: [part or 0.0 for part in _means([[s.stages.get(name, 0.0) for s in a.steps] for a in answers])]
        for name in names
    }
    rest = [max(0.0, total - sum(parts[place] for parts in stages.values())) for place, total in enumerate(totals)]
    stages["the loop itself" if names else "the whole step"] = rest
    shown = {name: parts for name, parts in stages.items() if sum(parts) >= 0.002 * sum(totals)}
    steps = list(range(1, len(totals) + 1))
    with page_style():
        figure = new_figure(3.0)
        axes = figure.add_subplot()
        below = np.zeros(len(steps))
        for number, (name, parts) in enumerate(shown.items()):
            axes.bar(
                steps,
                [1e3 * part for part in parts],
                bottom=below,
                width=0.86,
                color=SERIES[number % len(SERIES)],
                edgecolor=PAPER,
                linewidth=0.5,
                label=legend_label(name),
            )
            below = below + 1e3 * np.array(parts)
        axes.set_xlabel("step")
        axes.set_ylabel("milliseconds")
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, float(below.max()) * 1.22)
        axes.set_xlim(0.4, len(steps) + 0.6)
        _whole_numbers(axes)
        axes.legend(loc="upper right", ncols=min(3, len(shown)), columnspacing=1.0, handlelength=1.0, labelcolor=INK)
        slowest = max(shown, key=lambda name: sum(shown[name]))
        alt = (
            f"Stacked bars, one for each of {len(steps)} steps: a step takes {milliseconds(min(totals))} to "
            f"{milliseconds(max(totals))} ms, mean over {len(answers)} "
            f"answer{'s' if len(answers) > 1 else ''}. Most of it, {percent(sum(shown[slowest]) / sum(totals))}, is "
            f"{slowest}."
        )
        rows = [
            [str(step), *(milliseconds(parts[step - 1]) for parts in shown.values()), milliseconds(totals[step - 1])]
            for step in steps
        ]
        table = Table("Milliseconds by step and stage", ["step", *shown, "together"], rows)
        return Drawing(inline_svg(figure, "time"), "time", alt, table)


def prompt_table(answers: Sequence[Answer]) -> Table:
    """What each answer took and cost, from the picture to the last step."""
    rows: list[list[Any]] = [
        [
            str(number),
            str(len(answer.steps)),
            milliseconds(answer.prompt_seconds),
            *([milliseconds(answer.prefill_seconds)] if _prefills(answers) else []),
            milliseconds(answer.denoise_seconds),
            percent(answer.mean_kept, 1),
            f"{answer.work.total / 1e9:,.3g}",
            percent(answer.work.saved, 1),
        ]
        for number, answer in enumerate(answers, 1)
    ]
    prefill = ["prefill, ms"] if _prefills(answers) else []
    head = ["answer", "steps", "picture and prompt, ms", *prefill, "all steps, ms", "kept", "GFLOPs", "FLOPs saved"]
    return Table("Time and work of each answer", head, rows)


def _prefills(answers: Sequence[Answer]) -> bool:
    """Whether there is more than setting up before the first step."""
    return any(answer.prefill_seconds > 0.02 * answer.denoise_seconds for answer in answers)
