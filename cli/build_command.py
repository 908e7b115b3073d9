"""``d3tom-export build``"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from . import common, options


@click.command("build", cls=common.Command)
@click.option(
    "--model",
    "model_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Checkpoint folder: config.json, safetensors, tokenizer.json.  [default: the bundled lavida-tiny]",
)
@options.merge_options
@options.cache_merge_options
@options.target_options
@options.generation_options
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Bundle folder to write.  [default: MODEL-d3tom-lLAYER-rRATIO[-cached|-both] in the current folder]",
)
@click.option("--force", is_flag=True, help="Replace the output folder if it is a bundle.")
@click.option(
    "--clip-vocabulary/--full-vocabulary",
    default=True,
    show_default=True,
    help="Cut the vocabulary to the tokenizer's length, as the release does, or keep every stored row.",
)
@click.option(
    "--drop-newline/--keep-newline",
    default=True,
    show_default=True,
    help="Drop the token after a picture, as the release does when it answers, or keep it.",
)
@click.option(
    "--self-check",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    metavar="N",
    help="Samples to validate against PyTorch before the bundle is declared done.",
)
@common.json_option
def command(
    model_folder: Path | None,
    layer: int,
    ratio: float,
    schedule: Any,
    select: Any,
    aggregate: Any,
    positions: Any,
    remerge: Any,
    cached_adaptive: bool,
    restore_norm: bool,
    text_targets: bool,
    kv_cache: str | None,
    no_kv_cache: bool,
    output: Path | None,
    force: bool,
    clip_vocabulary: bool,
    drop_newline: bool,
    self_check: int,
    json_file: str | None,
    **generation_options: Any,
) -> None:
    """Patch a checkpoint with D3ToM and export it to a bundle of ONNX stages.

    The stages are cut at --layer; picture sizes, prompt and answer lengths and the merge ratio stay free, so one
    bundle serves them all. Nothing is left behind when a build fails.

    \b
    d3tom-export build --layer 2 --ratio 0.9
    d3tom-export build --model checkpoints/lavida --layer 3 --ratio 0.8 --output lavida-bundle
    d3tom-export build --layer 2 --ratio 0.9 --kv-cache both
    """
    from d3tom_export.bundle import check_output_folder, new_folder
    from d3tom_export.bundled import bundled_model
    from d3tom_export.checkpoint import open_checkpoint
    from d3tom_export.config import MergeConfig

    started = time.perf_counter()
    folder = bundled_model() if model_folder is None else model_folder
    loops = options.loops_from(kv_cache, no_kv_cache)
    suffix = "-both" if len(loops) > 1 else "-cached" if "cached" in loops else ""
    output = output or Path(f"{folder.resolve().name}-d3tom-l{layer}-r{ratio:g}{suffix}")
    # Everything that can be refused is refused before torch is imported and any work begins.
    cache = options.cache_merge_from(loops, remerge, cached_adaptive, restore_norm, text_targets)
    merge = MergeConfig(layer, ratio, schedule, select, aggregate, positions, cache)
    if "cached" in loops:
        merge.check_cached()
    check_output_folder(output, force)
    checkpoint = open_checkpoint(folder, clip_vocabulary=clip_vocabulary)
    merge.check_layer(checkpoint.config.language.n_layers)
    progress = common.ConsoleProgress()
    progress("loading torch and the checkpoint", 0, 1)

    from d3tom_export.build import build_bundle, default_generation

    generation = options.generation_from(default_generation(folder), generation_options)
    with new_folder(output, force) as partial:
        report = build_bundle(
            checkpoint,
            merge,
            generation,
            partial,
            loops=loops,
            drop_token_after_image=drop_newline,
            self_check=self_check,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in output.iterdir())
    result = {
        "bundle": str(output),
        "model": folder.resolve().name,
        "loops": list(loops),
        "merge": merge.to_json(),
        "generation": generation.to_json(),
        "bytes": size,
        "seconds": round(seconds, 2),
        "validation": report,
        "passed": report is None or report["passed"],
    }
    common.write_json(json_file, result)
    common.say(json_file, f"Built {output} in {seconds:.1f} s ({size / 1e6:.1f} MB).")
    if merge.schedule == "adaptive" and merge.ratio < 0.5 and ("uncached" in loops or cache.adaptive):
        common.say(
            json_file,
            f"Note: the released adaptive schedule averages about 0.5 for any ratio below it; {merge.ratio:g} is only "
            "reached with --schedule fixed.",
        )
    if report is None:
        common.say(json_file, "Not validated (--self-check 0). Run `d3tom-export validate` before relying on it.")
    elif report["passed"]:
        common.say(
            json_file,
            f"Self-check passed: {report['samples']} samples, {report['steps']} steps, tokens and kept sets identical "
            f"to PyTorch, largest logit difference {report['max_abs_logit_error']:.1e}.",
        )
    else:
        raise click.ClickException(
            f"The bundle was written to {output} but did not pass its self-check: {'; '.join(report['problems'][:3])} "
            f"(largest logit difference {report['max_abs_logit_error']}, allowed {report['logit_tolerance']:.0e}). "
            f"Its manifest says so. Run `d3tom-export validate {output}` for the whole report."
        )
