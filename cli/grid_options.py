"""Options that take several values, of which every combination is tried; and how they become settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from d3tom_export.config import (
    LOOPS,
    Aggregation,
    Deciders,
    Loop,
    MergeAt,
    MergeConfig,
    MergedPositions,
    MergeSchedule,
    Remerge,
    SelectionPolicy,
)

from . import answer_options
from .options import RATIO, F, backend_options, choice, verify_option, vision_tower_option
from .sections import NUMBERS, Section, apply_options, heading, under

if TYPE_CHECKING:
    from d3tom_export.quality.dataset import DataSet, Item

MOST_VALUES = 64
"""Of one option."""


class Several(click.ParamType):
    """Values of one type, with commas between them; each counts once."""

    def __init__(self, inner: click.ParamType) -> None:
        self._inner = inner
        self.name = f"{inner.name} list"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str | None:
        values = getattr(self._inner, "choices", None)
        shown = "|".join(values) if values else NUMBERS[self._inner.name]
        return f"{shown},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if len(parts) > MOST_VALUES:
            self.fail(f"{len(parts)} values were given, at most {MOST_VALUES} are tried.", param, ctx)
        return tuple(dict.fromkeys(self._inner.convert(part.strip(), param, ctx) for part in parts))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """What may stand behind the last comma."""
        before, comma, last = incomplete.rpartition(",")
        items = self._inner.shell_complete(ctx, param, last)
        return [CompletionItem(f"{before}{comma}{item.value}", help=item.help) for item in items]


def source_options(function: F) -> F:
    """What is evaluated, and with which questions."""
    return apply_options(
        function,
        [
            heading(Section.SOURCE),
            click.option(
                "--model",
                "model_folder",
                type=click.Path(path_type=Path),
                metavar="DIR",
                help="Checkpoint folder in place of a BUNDLE, run in eager PyTorch: every setting may vary, nothing is "
                "exported.  [default, without a BUNDLE: the bundled model]",
            ),
            heading(Section.ASKING),
            click.option(
                "--data",
                "data_path",
                type=click.Path(path_type=Path),
                metavar="DIR",
                help="Questions with known answers: a folder with *.jsonl files and the pictures they name, one such "
                "file, or a zip like a bundle's samples.zip.  [default: the model's own samples]",
            ),
            click.option(
                "--samples", type=click.IntRange(min=1), metavar="N", help="Ask the first N questions.  [default: all]"
            ),
        ],
    )


def scoring_options(function: F) -> F:
    """When an answer is right."""
    return apply_options(
        function,
        [
            heading(Section.SCORING),
            click.option(
                "--metric",
                type=click.Choice(["exact-match", "anls"]),
                default="exact-match",
                show_default=True,
                help="Score that settings are compared by. Exact match is reported beside ANLS.",
            ),
            click.option(
                "--match",
                metavar="REGEX",
                help="Compare what this regular expression finds in an answer (the first of its groups that took part, "
                "if any did); an answer where it finds nothing is wrong.",
            ),
            click.option(
                "--normalize/--no-normalize",
                default=True,
                show_default=True,
                help="Exact match without regard to case, punctuation, articles and white space, or letter for letter.",
            ),
        ],
    )


RELEASED = {
    "loops": "the bundle's first; with --model uncached",
    "layers": "the bundle's; with --model 3, as released",
    "ratios": "the bundle's; with --model 0.8, as released",
    "schedules": "the bundle's; with --model adaptive",
    "selects": "the bundle's; with --model decider",
    "aggregates": "the bundle's; with --model sum",
    "positions": "the bundle's; with --model compact",
    "merge_ats": "the bundle's; with --model step",
    "deciders": "the bundle's; with --model committed",
    "remerges": "the bundle's; with --model every-step",
}
"""What is tried where an option of :func:`grid_options` is not given, in words."""


def grid_options(function: F, usual: Mapping[str, str] = RELEASED) -> F:
    """Settings of which every combination is tried; ``usual`` says which, where an option is not given."""

    def default(name: str) -> str:
        return f"[default: {usual[name]}]"

    return apply_options(
        function,
        [
            heading(Section.LOOPS),
            click.option(
                "--loop",
                "loops",
                type=Several(choice(Loop)),
                help=f"Loops to run.  {default('loops')}",
            ),
            click.option("--kv-cache/--no-kv-cache", default=None, help="Short for --loop cached and --loop uncached."),
            heading(Section.MERGING),
            click.option(
                "--layer",
                "layers",
                type=Several(click.IntRange(min=0)),
                help=f"Layers l* in which visual tokens merge.  {default('layers')}",
            ),
            click.option(
                "--ratio",
                "ratios",
                type=Several(RATIO),
                help=f"Shares of visual tokens merged away. 0 is unmerged, which is always run, to compare with.  "
                f"{default('ratios')}",
            ),
            click.option(
                "--schedule",
                "schedules",
                type=Several(choice(MergeSchedule)),
                help=f"Ratio over the steps.  {default('schedules')}",
            ),
            click.option(
                "--select",
                "selects",
                type=Several(choice(SelectionPolicy)),
                help=f"Who picks the tokens that stay.  {default('selects')}",
            ),
            click.option(
                "--aggregate",
                "aggregates",
                type=Several(choice(Aggregation)),
                help=f"How a kept token takes in the others.  {default('aggregates')}",
            ),
            click.option(
                "--positions",
                "positions",
                type=Several(choice(MergedPositions)),
                help=f"Rotary positions after merging.  {default('positions')}",
            ),
            click.option(
                "--deciders",
                "deciders",
                type=Several(choice(Deciders)),
                help=f"Which tokens decide.  {default('deciders')}",
            ),
            click.option(
                "--keep-multiple",
                type=click.IntRange(min=1),
                metavar="N",
                help="Round the number of kept tokens up to a multiple of N.  [default: 1]",
            ),
            heading(Section.LOOPS),
            click.option(
                "--merge-at",
                "merge_ats",
                type=Several(choice(MergeAt)),
                help=f"When the loop with a KV cache merges.  {default('merge_ats')}",
            ),
            click.option(
                "--remerge",
                "remerges",
                type=Several(choice(Remerge)),
                help=f"How often a KV cache is merged anew.  {default('remerges')}",
            ),
            click.option(
                "--cached-adaptive/--cached-fixed",
                default=None,
                help="Whether the adaptive schedule applies with a KV cache.  [default: the bundle's, or fixed]",
            ),
            partial(answer_options.generation_options, many=Several),
        ],
    )


_results_option = under(
    Section.OUTPUT,
    click.option(
        "--results",
        "results_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Keep every answer in FILE, a line of JSON each; where it is there, go on with the answers in it. "
        "evaluate and tune may share one.",
    ),
)


def evaluation_options(function: F, usual: Mapping[str, str] = RELEASED) -> F:
    """All that ``evaluate`` and ``tune`` share: what is asked, where it runs, the grid, and when an answer is right."""
    return apply_options(
        function,
        [
            source_options,
            vision_tower_option,
            backend_options,
            verify_option("auto"),
            partial(grid_options, usual=usual),
            answer_options.early_exit_option("on"),
            answer_options.wording_options,
            scoring_options,
            _results_option,
        ],
    )


def loops_from(options: dict[str, Any], default: Sequence[Loop], there: Sequence[Loop]) -> tuple[Loop, ...]:
    """The loops that were asked for, of those that are ``there`` (``options`` is emptied of them)."""
    loops, kv_cache = options.pop("loops"), options.pop("kv_cache")
    if loops is not None and kv_cache is not None:
        raise click.UsageError("--loop and --kv-cache say the same; give one of them.")
    if kv_cache is not None:
        loops = ("cached",) if kv_cache else ("uncached",)
    if loops is None:
        return tuple(default)
    lacking = [loop for loop in loops if loop not in there]
    if lacking:
        from d3tom_export.errors import D3tomError

        raise D3tomError(
            f"This bundle has no stages for the {' and the '.join(lacking)} loop. Build one with --kv-cache both, or "
            "leave it out of --loop."
        )
    return tuple(loop for loop in LOOPS if loop in loops)


def merges_from(base: MergeConfig, options: dict[str, Any], loops: Sequence[Loop]) -> list[MergeConfig]:
    """``base`` with every combination of what was given (``options`` is emptied of it); ratio 0 merges nothing.

    Raises :class:`click.UsageError` for a merge at the prefill where none of ``loops`` has one, and for ratios under a
    schedule that merges nothing.
    """
    if "prefill" in (options["merge_ats"] or ()) and "cached" not in loops:
        raise click.UsageError("--merge-at prefill concerns the loop with a KV cache; add --loop cached.")
    axes = {
        "layer": options.pop("layers"),
        "ratio": options.pop("ratios"),
        "schedule": options.pop("schedules"),
        "select": options.pop("selects"),
        "aggregate": options.pop("aggregates"),
        "positions": options.pop("positions"),
        "merge_at": options.pop("merge_ats"),
        "deciders": options.pop("deciders"),
    }
    remerges = options.pop("remerges") or (base.cache.remerge,)
    adaptive, multiple = options.pop("cached_adaptive"), options.pop("keep_multiple")
    cache = base.cache if adaptive is None else replace(base.cache, adaptive=adaptive)
    base = base if multiple is None else replace(base, keep_multiple=multiple)
    given = {name: values for name, values in axes.items() if values is not None}
    if base.schedule == "none" and "schedule" not in given and any(given.get("ratio", ())):
        raise click.UsageError(
            "This bundle was built with --schedule none, which merges nothing at any --ratio: add --schedule adaptive "
            "or fixed."
        )
    found = []
    for values in product(*given.values()):
        changes = dict(zip(given, values, strict=True))
        if changes.get("ratio", base.ratio) == 0:
            changes |= {"ratio": 0.0, "schedule": "none"}
        for remerge in remerges:
            found.append(replace(base, cache=replace(cache, remerge=remerge), **changes))
    return list(dict.fromkeys(found))


def questions_of(data_path: Path | None, own: Path, samples: int | None) -> tuple[DataSet, list[Item]]:
    """The questions of ``--data``, or those that the model's folder ``own`` brings along; the first ``samples``."""
    from d3tom_export.quality.dataset import open_data, samples_of

    data = samples_of(own) if data_path is None else open_data(data_path)
    return data, data.first(samples)
