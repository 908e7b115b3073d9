"""A picture of the FLOPs that merging saves over l* and ratio: the paper's figure 5.

matplotlib draws it, from the optional extra ``plots``, imported only here and only when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d3tom_export.cost.figure import need_matplotlib, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_reductions(
    path: Path,
    title: str,
    layers: Sequence[int],
    ratios: Sequence[float],
    saved: Sequence[Sequence[float]],
    mark: tuple[int, float, float],
) -> None:
    """Write the picture to ``path``, in the format of its ending.

    ``saved`` holds shares in [0, 1], a row for each of ``layers`` and a column for each of ``ratios``, both ascending
    and at least two; ``mark`` is the l*, ratio and share of the setting to point at, ``title`` a line under the
    heading. Raises :class:`D3tomError` where matplotlib is missing or the file cannot be written.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=110, layout="constrained")
    axes = plot_reductions(figure, layers, ratios, saved, mark)
    figure.suptitle("FLOPs that D3ToM saves without a KV cache", fontweight="bold")
    axes.set_title(title, fontsize=9)
    save(figure, path)


def plot_reductions(
    figure: Figure,
    layers: Sequence[int],
    ratios: Sequence[float],
    saved: Sequence[Sequence[float]],
    mark: tuple[int, float, float],
    *,
    fontsize: float = 9,
) -> Axes:
    """Draw what :func:`draw_reductions` does into an empty ``figure``, without headings; ``fontsize`` is of labels."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes = figure.add_subplot()
    percent = [[100 * share for share in column] for column in zip(*saved, strict=True)]
    # cividis: the same order of lightness to every kind of colour vision, and in print.
    mesh = axes.pcolormesh(layers, ratios, percent, cmap="cividis", shading="nearest", vmin=0, rasterized=True)
    lines = axes.contour(layers, ratios, percent, levels=range(10, 100, 10), colors="white", linewidths=1.2)
    for label in axes.clabel(lines, fmt="%d%%", fontsize=fontsize):
        label.set_path_effects([withStroke(linewidth=2, foreground="#333333")])

    layer, ratio, share = mark
    axes.plot(layer, ratio, marker="o", markersize=8, color="white", markeredgecolor="black", clip_on=False, zorder=3)
    left = layer > (layers[0] + layers[-1]) / 2
    axes.annotate(
        rf"$l^*$ = {layer}, $\alpha$ = {ratio:g}: {share:.1%}",
        (layer, ratio),
        xytext=(-12 if left else 12, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        fontsize=fontsize,
        color="black",
        bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none"},
        zorder=3,
    )
    axes.set_xlabel("merge layer $l^*$, counted from 0")
    axes.set_ylabel(r"merge ratio $\alpha$")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(mesh, ax=axes, format=PercentFormatter(decimals=0))
    bar.set_label("share of the unmerged answer's FLOPs")
    return axes
