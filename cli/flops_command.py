"""``d3tom-export flops``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3tom_export.backends.choice import ENGINE_PRECISIONS
from d3tom_export.checkpoint.geometry import DEFAULT_GEOMETRY, GEOMETRIES
from d3tom_export.config import CommitRule

from . import answer_options, common, options, quantize_options
from .sections import Section, heading

if TYPE_CHECKING:
    from d3tom_export.config import GenerationConfig, Loop, MergeConfig, ModelConfig, VisionConfig
    from d3tom_export.cost.flops import Workload
    from d3tom_export.quantize.plan import QuantizeRequest

RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Columns of the table of reductions, beside --ratio. The adaptive schedule's mean does not go below a half."""

RULE_STEPS = 5
"""Steps of an answer under a commit rule, unless told otherwise."""

TEXT_TOKENS = 75
"""Text tokens of LaViDa's prompt around a short question (P = 1083 at V = 1008)."""


@dataclass(frozen=True)
class _Subject:
    """What is counted: a model, and how it answers and merges unless the options say otherwise."""

    name: str
    model: ModelConfig
    tower_layers: int | None
    generation: GenerationConfig
    merge: MergeConfig
    precision: str
    quantize: QuantizeRequest | None = None


@click.command(
    "flops",
    cls=common.Command,
    first="model bundle geometry layer ratio kv-cache gen-length visual-tokens steps figure",
)
@heading(Section.SOURCE)
@click.option("--model", "model_folder", type=click.Path(path_type=Path), metavar="DIR", help="A checkpoint's sizes.")
@options.vision_tower_option
@click.option(
    "--bundle",
    "bundle_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A bundle's sizes, merging and settings.",
)
@click.option(
    "--geometry",
    type=click.Choice(GEOMETRIES),
    help=f"The sizes of a known model, without a checkpoint.  [default: {DEFAULT_GEOMETRY}]",
)
@heading(Section.MERGING)
@click.option(
    "--layer", type=click.IntRange(min=0), help="Layer l* in which visual tokens merge.  [default: the bundle's, or 3]"
)
@options.merge_override_options
@heading(Section.LOOPS)
@click.option(
    "--kv-cache/--no-kv-cache", default=None, help="Count the loop with or without a KV cache alone.  [default: both]"
)
@answer_options.plan_options
@heading(Section.COMMITTING)
@click.option(
    "--commit",
    "rule",
    type=options.choice(CommitRule),
    default="threshold",
    show_default=True,
    help="Commit rule whose answers are counted beside the plan's; plan counts none.",
)
@click.option(
    "--rule-steps",
    type=click.IntRange(min=1),
    default=RULE_STEPS,
    show_default=True,
    help="Steps of an answer under that rule. How many it takes, only a run can tell: see bench --samples.",
)
@heading(Section.SIZES)
@click.option(
    "--visual-tokens",
    type=click.IntRange(min=0),
    metavar="V",
    help="Visual tokens.  [default: those of a square picture, 1008 at LaViDa's size]",
)
@click.option(
    "--text-tokens", type=click.IntRange(min=1), default=TEXT_TOKENS, show_default=True, help="The prompt's others."
)
@click.option(
    "--views",
    type=click.IntRange(min=0),
    help="Views of pictures that the vision tower encodes.  [default: those of a square picture, 5 at LaViDa's size; "
    "0 without visual tokens]",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Answers at a time.")
@heading(Section.QUANTIZATION)
@click.option(
    "--precision",
    type=click.Choice(ENGINE_PRECISIONS),
    help="Of weights and cache, for bytes.  [default: the bundle's, or bf16]",
)
@quantize_options.quantize_options
@heading(Section.OUTPUT)
@click.option("--steps", "every_step", is_flag=True, help="Also show every step of the merged answers.")
@click.option(
    "--figure",
    "figure_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also draw the FLOPs saved over l* and ratio, the paper's figure 5, to FILE.png or FILE.svg; needs the extra "
    "`plots`.",
)
@common.json_option
def command(
    model_folder: Path | None,
    vision_tower: Path | None,
    bundle_folder: Path | None,
    geometry: str | None,
    layer: int | None,
    kv_cache: bool | None,
    rule: CommitRule,
    rule_steps: int,
    visual_tokens: int | None,
    text_tokens: int,
    views: int | None,
    batch: int,
    precision: str | None,
    every_step: bool,
    figure_file: Path | None,
    json_file: str | None,
    **settings: Any,
) -> None:
    """Count an answer's FLOPs and bytes, stage by stage, and what merging and few steps save.

    Nothing runs: the counts follow from the sizes alone, exactly. FLOPs are those of matrix
    products, two per multiply-add; bytes are those of weights and of the KV cache. Without a bundle, merging is the
    release's: l* = 3, ratio 0.8, adaptive.

    \b
    d3tom-export flops
    d3tom-export flops --layer 2 --ratio 0.9 --figure reduction.png
    d3tom-export flops --geometry lavida-tiny --kv-cache --remerge per-block --steps
    """
    from dataclasses import replace

    from d3tom_export.cost.flop_figure import draw_reductions
    from d3tom_export.cost.flop_stages import prompt_stages, reductions
    from d3tom_export.cost.flops import Workload
    from d3tom_export.engines.memory import answer_sizes, paper_memory
    from d3tom_export.errors import D3tomError

    from . import flops_report as report

    if sum(source is not None for source in (model_folder, bundle_folder, geometry)) > 1:
        raise click.UsageError("--model, --bundle and --geometry exclude one another; give the sizes of one model.")
    options.check_figure(figure_file)
    options.check_vision_tower(vision_tower, model_folder)
    quantize = quantize_options.quantize_from(settings)
    subject = _subject(model_folder, vision_tower, bundle_folder, geometry or DEFAULT_GEOMETRY)
    language, vision = subject.model.language, subject.model.vision
    planned = subject.generation if subject.generation.planned else subject.generation.changed(commit="plan")
    generation = answer_options.generation_from(planned, settings)
    merge = options.merge_from(subject.merge, settings, runs=False)
    merge = merge if layer is None else replace(merge, layer=layer)
    merge.check_layer(language.n_layers)
    square_tokens, square_views = (0, 0) if vision is None else _square_picture(vision)
    visual_tokens = square_tokens if visual_tokens is None else visual_tokens
    views = (square_views if visual_tokens else 0) if views is None else views
    options.check_length(language, text_tokens, visual_tokens, generation.gen_length)
    precision = precision or subject.precision
    rules = _rules(generation, rule, rule_steps)
    quantize = quantize or subject.quantize
    item = 4 if precision == "fp32" else 2
    work = Workload(text_tokens + visual_tokens, visual_tokens, generation.gen_length, batch, item, quantize)
    merges = merge.schedule != "none" and visual_tokens > 0
    if figure_file is not None and not merges:
        raise D3tomError(
            "--figure would show nothing: without visual tokens, or with --schedule none, nothing merges. Leave it out."
        )

    loops: tuple[Loop, ...] = ("uncached", "cached") if kv_cache is None else ("cached",) if kv_cache else ("uncached",)
    result: dict[str, Any] = {
        "model": subject.name,
        "precision": precision,
        "weights": None if quantize is None else quantize.format,
        "layers": language.n_layers,
        "width": language.d_model,
        "vocabulary": language.vocab_rows,
        "prompt_tokens": work.prompt_tokens,
        "visual_tokens": visual_tokens,
        "answer_tokens": work.answer_tokens,
        "batch": batch,
        "views": views,
        "merge": merge.to_json(),
        "generation": generation.to_json(),
        "prompt": report.stages_json(prompt_stages(subject.model, work, views, tower_layers=subject.tower_layers)),
        "rules": {each: settings.total_steps for each, settings in rules.items()},
        "answers": report.answers(language, work, generation, rules, merge, loops, every_step),
    }
    sizes = answer_sizes(batch, work.prompt_tokens, visual_tokens, work.answer_tokens)
    result["device_memory"] = {
        loop: paper_memory(subject.model, merge, loop, precision, sizes, quantize).to_json() for loop in loops
    }
    if merges and "uncached" in loops:
        layers, ratios = list(range(language.n_layers)), sorted({*RATIOS, merge.ratio})
        saved = reductions(language, work, merge, generation, layers, ratios)
        result["reductions"] = {"schedule": merge.schedule, "layers": layers, "ratios": ratios, "saved": saved}
    if figure_file is not None:
        layers, ratios = list(range(language.n_layers)), _figure_ratios(merge)
        saved = reductions(language, work, merge, generation, layers, ratios)
        ((here,),) = reductions(language, work, merge, generation, [merge.layer], [merge.ratio])
        title = _figure_title(subject, work, generation, merge)
        draw_reductions(figure_file, title, layers, ratios, saved, (merge.layer, merge.ratio, here))
        result["figure"] = str(figure_file)
    common.write_json(json_file, result)
    common.say(json_file, report.text(result))


def _rules(plan: GenerationConfig, rule: CommitRule, steps: int) -> dict[CommitRule, GenerationConfig]:
    """A plan of ``steps`` for ``rule``, at least one a block and at most as many as ``plan`` has."""
    if rule == "plan":
        return {}
    each = max(1, min(steps, plan.total_steps) // plan.blocks)
    return {rule: plan.changed(steps=each * plan.blocks, schedule="none")}


def _subject(
    model_folder: Path | None, vision_tower: Path | None, bundle_folder: Path | None, geometry: str
) -> _Subject:
    from d3tom_export.bundle.folder import load_bundle
    from d3tom_export.bundled import DEFAULT_MODEL, bundled_model
    from d3tom_export.checkpoint.folder import default_generation, open_checkpoint
    from d3tom_export.checkpoint.geometry import geometry_config
    from d3tom_export.config import MergeConfig
    from d3tom_export.errors import D3tomError
    from d3tom_export.quantize.plan import quantization_of

    released = MergeConfig(layer=3, ratio=0.8)
    if model_folder is not None:
        checkpoint = open_checkpoint(model_folder, vision_tower=vision_tower)
        common.tell_notes(checkpoint)
        generation = default_generation(checkpoint.config, model_folder)
        name = model_folder.resolve().name
        return _Subject(name, checkpoint.config, checkpoint.vision_layers, generation, released, "bf16")
    if bundle_folder is not None:
        bundle = load_bundle(bundle_folder)
        manifest = bundle.manifest
        if manifest.merge.select != "decider":
            raise D3tomError(
                f"{bundle_folder} selects visual tokens by {manifest.merge.select!r}, whose FLOPs are not counted: "
                "expected a bundle that merges by decider tokens. Give its checkpoint with --model instead."
            )
        checkpoint = open_checkpoint(bundle_folder, vocab_rows=manifest.vocab_rows)
        return _Subject(
            str(bundle_folder),
            bundle.config,
            checkpoint.vision_layers,
            manifest.generation,
            manifest.merge,
            manifest.precision,
            quantization_of(checkpoint.quantized),
        )
    config = geometry_config(geometry)
    generation = default_generation(config, bundled_model() if geometry == DEFAULT_MODEL else None)
    return _Subject(geometry, config, None, generation, released, "bf16")


def _square_picture(vision: VisionConfig) -> tuple[int, int]:
    """Visual tokens and views of a square picture as large as the model takes."""
    from d3tom_export.pictures.canvas import best_canvas, count_visual_tokens

    side = max(max(size) for size in vision.grid_pinpoints)
    canvas = best_canvas((side, side), vision.grid_pinpoints)
    tiles = canvas[0] * canvas[1] // vision.image_size**2
    return count_visual_tokens((side, side), vision), 1 + tiles


def _figure_ratios(merge: MergeConfig) -> list[float]:
    """The picture's ratios: below a half the adaptive schedule's mean stays where it is, so nothing is to be seen."""
    return [percent / 100 for percent in range(50 if merge.schedule == "adaptive" else 10, 97, 2)]


def _figure_title(subject: _Subject, work: Workload, generation: GenerationConfig, merge: MergeConfig) -> str:
    steps = generation.total_steps
    return (
        f"{Path(subject.name).name}: V = {work.visual_tokens}, P = {work.prompt_tokens}, G = {work.answer_tokens}, "
        f"{steps} steps, {merge.schedule} ratio"
    )
