"""``d3tom-export evaluate``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3tom_export.backends.choice import check_choice

from . import answer_options, common, grid_options, options

if TYPE_CHECKING:
    from d3tom_export.backends.onnxruntime_options import Device
    from d3tom_export.bundle.folder import Verify
    from d3tom_export.quality.scoring import Metric


@click.command("evaluate", cls=common.Command, first="model data samples loop layer ratio select metric results json")
@click.argument("bundle_folder", metavar="[BUNDLE]", required=False, type=click.Path(path_type=Path))
@grid_options.evaluation_options
@common.json_option
def command(
    bundle_folder: Path | None,
    model_folder: Path | None,
    data_path: Path | None,
    samples: int | None,
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
    json_file: str | None,
    **settings: Any,
) -> None:
    """Ask questions with known answers in many settings, and tell what of the differences is more than chance.

    Options with a list try every combination of their values. Each is compared with the same loop unmerged, and other
    selections with the deciders' at equal numbers of kept tokens: retention and difference with paired bootstrap
    intervals, and in words only what a sign test over all comparisons bears out. A bundle's graphs fix the layer and
    the kind of selection; a checkpoint (--model), or a bundle with --backend pytorch, runs any. With --results a
    command that was stopped goes on where it was; its answers serve further settings, metrics and samples too.

    \b
    d3tom-export evaluate --layer 1,2,3 --ratio 0,0.5,0.9 --select decider,random --samples 64
    d3tom-export evaluate lavida-tiny-d3tom-l2-r0.9 --ratio 0.5,0.7,0.9 --results answers.jsonl
    d3tom-export evaluate --model checkpoints/lavida --data docvqa --metric anls --loop uncached,cached
    """
    from d3tom_export.quality.answering import answer_all
    from d3tom_export.quality.dataset import groups_of
    from d3tom_export.quality.intervals import units_in, unseen_loss
    from d3tom_export.quality.report import rows_of
    from d3tom_export.quality.results import Results
    from d3tom_export.quality.scoring import Scoring
    from d3tom_export.quality.settings import grid

    from .evaluate_report import table
    from .quality_source import open_source

    check_choice(backend, device, precision, cuda_graphs, provider_cache, specialization)
    scoring = Scoring(match, normalize)
    progress = common.ConsoleProgress()
    engine = options.engine_settings(precision, cuda_graphs, provider_cache, specialization)
    source = open_source(bundle_folder, model_folder, vision_tower, backend, device, engine, verify, progress)
    source = source.asked(system, no_system, stops, early_exit)
    loops = grid_options.loops_from(settings, source.default_loops, source.loops)
    merges = grid_options.merges_from(source.merge, settings, loops)
    generations = answer_options.generations_from(source.generation, settings)
    for merge in merges:
        merge.check_layer(source.reader.config.language.n_layers)
    tried, left_out = grid(loops, merges, generations, source.refusal)
    for sentence in left_out:
        common.note(sentence)
    data, items = grid_options.questions_of(data_path, source.folder, samples)
    opened = source.runtime(tried[0])
    with Results(results_file, source.binding(data.sha256, opened)) as results:
        before = len(results.answers)
        if before:
            common.note(f"{results_file} has {before:,} answers already.")
        answer_all(source.runtime, source.reader, data, items, tried, results, common.TimeLeft(progress))
    rows = rows_of(tried, items, results, scoring, metric, generations[0].seed)
    result = {
        "model": source.name,
        "backend": opened.name,
        "precision": opened.precision,
        "data": data.name,
        "questions": len(items),
        "metric": metric,
        "match": match,
        "normalized": normalize,
        "answers_before": before,
        "unseen_loss": round(unseen_loss(units_in(groups_of(items), len(items))), 4),
        "rows": rows,
    }
    common.write_json(json_file, result)
    common.say(json_file, table(result))
