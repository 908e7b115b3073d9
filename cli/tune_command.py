"""``d3tom-export tune``"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3tom_export.backends.choice import check_choice
from d3tom_export.config import LOOPS, Loop, MergeConfig

from . import answer_options, common, grid_options, options
from .sections import Section, heading

if TYPE_CHECKING:
    from d3tom_export.backends.onnxruntime_options import Device
    from d3tom_export.bundle.folder import Verify
    from d3tom_export.quality.scoring import Metric
    from d3tom_export.quality.tuning import CostKind, Goal

    from .build_words import Given
    from .quality_source import Source

RATIOS = (0.5, 0.7, 0.8, 0.9)
"""Searched unless told otherwise."""

SEARCHED = grid_options.RELEASED | {
    "loops": "all there are",
    "layers": "1, 2, 3, a quarter and a half of the layers; of graphs the bundle's",
    "ratios": ", ".join(map(str, RATIOS)),
    "schedules": "adaptive and fixed",
    "positions": "both; of graphs the bundle's",
    "merge_ats": "both, where the bundle does both",
}
"""What is searched where an option is not given, in words."""


@click.command(
    "tune", cls=common.Command, first="min-retention max-flops max-time model data samples loop layer ratio results"
)
@click.argument("bundle_folder", metavar="[BUNDLE]", required=False, type=click.Path(path_type=Path))
@heading(Section.SEARCH)
@click.option(
    "--min-retention",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Find the cheapest setting that keeps at least this share of the unmerged score.",
)
@click.option(
    "--max-flops",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GFLOP",
    help="Find the best setting whose answers take at most so many GFLOP, on average.",
)
@click.option(
    "--max-time",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MS",
    help="Find the best setting whose answers take at most so many milliseconds here, in the median.",
)
@click.option(
    "--cost",
    type=click.Choice(["flops", "time"]),
    help="With --min-retention: what is cheapest, by FLOPs or by time measured here.  [default: flops]",
)
@click.option(
    "--proven",
    is_flag=True,
    help="With --min-retention: take only what keeps it with its lowest retention (95 %, one-sided, all checks "
    "together), not with the estimate alone. High floors take hundreds of questions then.",
)
@click.option(
    "--check-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    metavar="SHARE",
    help="Share of the questions that the choice is checked on and nothing is searched on.",
)
@partial(grid_options.evaluation_options, usual=SEARCHED)
@heading(Section.OUTPUT)
@click.option(
    "--figure",
    "figure_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also draw retention against cost, with the front, to FILE.png or FILE.svg; needs the extra `plots`.",
)
@common.json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle_folder: Path | None,
    min_retention: float | None,
    max_flops: float | None,
    max_time: float | None,
    cost: CostKind | None,
    proven: bool,
    model_folder: Path | None,
    data_path: Path | None,
    samples: int | None,
    check_share: float,
    vision_tower: Path | None,
    backend: str,
    device: Device,
    provider_cache: Path | None,
    precision: str | None,
    cuda_graphs: bool | None,
    specialization: str | None,
    verify: Verify,
    system: str | None,
    no_system: bool,
    stops: tuple[str, ...],
    early_exit: bool | None,
    metric: Metric,
    match: str | None,
    normalize: bool,
    results_file: Path | None,
    figure_file: Path | None,
    json_file: str | None,
    **settings: Any,
) -> None:
    """Search for the setting to build with: the cheapest that keeps a floor of quality, or the best within a budget.

    Candidates are every combination of loop, layer, ratio, schedule, positions and place of merging; options with
    a list narrow or widen them. They are halved round by round, each round with twice the questions. The choice is
    checked on questions that it was not searched on, and where it fails there the next safer one is tried, or of a
    budget the next best.
    A checkpoint is searched in eager PyTorch; of a bundle, what its graphs leave open. Prints the command to build,
    or to run, the choice. Exit code 1 where nothing keeps the goal.

    \b
    d3tom-export tune --min-retention 0.99
    d3tom-export tune --min-retention 0.95 --model checkpoints/lavida --data docvqa --metric anls --figure front.svg
    d3tom-export tune lavida-tiny-d3tom-l2-r0.9-both --max-time 40 --results answers.jsonl
    """
    from d3tom_export.quality.dataset import groups_of
    from d3tom_export.quality.results import Results
    from d3tom_export.quality.scoring import Scoring
    from d3tom_export.quality.settings import grid
    from d3tom_export.quality.tuning import Tuning

    from .build_words import command_of
    from .quality_source import open_source
    from .tune_report import as_json, text

    goal = _goal(min_retention, max_flops, max_time, cost, proven)
    check_choice(backend, device, precision, cuda_graphs, provider_cache, specialization)
    options.check_figure(figure_file)
    scoring = Scoring(match, normalize)
    progress = common.ConsoleProgress()
    engine = options.engine_settings(precision, cuda_graphs, provider_cache, specialization)
    source = open_source(bundle_folder, model_folder, vision_tower, backend, device, engine, verify, progress)
    source = source.asked(system, no_system, stops, early_exit)
    loops = grid_options.loops_from(settings, LOOPS if source.eager else source.loops, source.loops)
    _widen(settings, source, loops)
    merges = grid_options.merges_from(source.merge, settings, loops)
    generations = answer_options.generations_from(source.generation, settings)
    for merge in merges:
        merge.check_layer(source.reader.config.language.n_layers)
    candidates, _ = grid(loops, merges, generations, source.refusal)
    if len(candidates) < 2:
        raise click.UsageError("There is nothing to search: give --ratio, --layer or another option several values.")
    if figure_file is not None:
        from d3tom_export.cost.figure import need_matplotlib

        need_matplotlib()
    data, items = grid_options.questions_of(data_path, source.folder, samples)
    opened = source.runtime(candidates[0])
    if len(items) > 1 and len(set(groups_of(items))) == 1 and items[0].pictures:
        common.note("All questions are about one picture: what is found holds for it alone.")
    with Results(results_file, source.binding(data.sha256, opened)) as results:
        if results.answers and goal.cost == "time":
            common.note(
                f"{results_file} has {len(results.answers):,} answers already, and a file does not say where they were "
                "made: their times count as this machine's now. Give --results another file to measure anew."
            )
        tuning = Tuning(
            source.runtime,
            source.reader,
            data,
            candidates,
            results,
            scoring,
            metric,
            goal,
            generations[0].seed,
        )
        outcome = tuning.run(items, check_share, common.TimeLeft(progress))
    command, notes = None, list[str]()
    if outcome.chosen is not None:
        given = _given(backend, device, provider_cache, precision, cuda_graphs, specialization,
                       system, no_system, stops, early_exit)  # fmt: skip
        command, notes = command_of(outcome.chosen.setting, source, given)
    result = as_json(tuning, outcome, source, opened, command) | {"command_notes": notes, "data": data.name}
    if figure_file is not None:
        from d3tom_export.quality.frontier_figure import draw_frontier

        draw_frontier(figure_file, f"{source.name}, {opened.name}: {result['searched_on']} questions", outcome, goal)
        result["figure"] = str(figure_file)
    common.write_json(json_file, result)
    common.say(json_file, text(result))
    if outcome.chosen is None:
        ctx.exit(1)


def _goal(
    min_retention: float | None,
    max_flops: float | None,
    max_time: float | None,
    cost: CostKind | None,
    proven: bool,
) -> Goal:
    from d3tom_export.quality.tuning import Goal

    given = [
        name
        for name, value in (
            ("--min-retention", min_retention),
            ("--max-flops", max_flops),
            ("--max-time", max_time),
        )
        if value is not None
    ]
    if len(given) != 1:
        raise click.UsageError(
            "Say what is to be kept: --min-retention SHARE, a floor of quality, or one of --max-flops GFLOP and "
            f"--max-time MS, a budget; {' and '.join(given) or 'nothing'} was given."
        )
    if min_retention is not None:
        return Goal(min_retention, None, cost or "flops", proven)
    if cost is not None or proven:
        raise click.UsageError("--cost and --proven go with --min-retention; a budget says what it counts.")
    if max_flops is not None:
        return Goal(None, 1e9 * max_flops, "flops")
    assert max_time is not None
    return Goal(None, 1e-3 * max_time, "time")


def _widen(settings: dict[str, Any], source: Source, loops: tuple[Loop, ...]) -> None:
    """Search the usual values of what no option says, as far as ``source`` can vary it."""
    last = source.reader.config.language.n_layers - 1

    def usual(name: str, values: tuple[Any, ...]) -> None:
        if settings[name] is None:
            settings[name] = values

    if source.eager:
        depths = {1, 2, 3, (last + 1) // 4, (last + 1) // 2}
        usual("layers", tuple(sorted(depth for depth in depths if depth < last)) or (0,))
    built: MergeConfig = source.merge
    usual("ratios", RATIOS)
    usual("schedules", ("adaptive", "fixed"))
    if source.eager and "uncached" in loops:
        usual("positions", ("compact", "original"))
    at_prefill = source.eager or built.merge_at == "prefill"
    if "cached" in loops and at_prefill and last not in (settings["layers"] or (built.layer,)):
        usual("merge_ats", ("step", "prefill"))


def _given(
    backend: str,
    device: Device,
    provider_cache: Path | None,
    precision: str | None,
    cuda_graphs: bool | None,
    specialization: str | None,
    system: str | None,
    no_system: bool,
    stops: tuple[str, ...],
    early_exit: bool | None,
) -> Given:
    """What of the options a printed command has to say again."""
    from .build_words import Given

    runtime: list[str] = []
    for option, value, usual in (
        ("--backend", backend, "auto"),
        ("--provider", device, "auto"),
        ("--provider-cache", provider_cache, None),
        ("--precision", precision, None),
        ("--specialization", specialization, None),
    ):
        runtime += [] if value == usual else [option, str(value)]
    if cuda_graphs is not None:
        runtime.append("--cuda-graphs" if cuda_graphs else "--no-cuda-graphs")
    wording = [] if system is None else ["--system", system]
    wording += ["--no-system"] if no_system else []
    wording += [word for stop in stops for word in ("--stop", stop)]
    wording += ["--no-early-exit"] if early_exit is False else []
    graphs = precision in ("int8", "fp16", "bf16") and backend not in options.ENGINE_BACKENDS
    return Given(tuple(runtime), tuple(wording), ("--precision", str(precision)) if graphs else ())
