"""``d3tom-export build``"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from d3tom_export.bundle.half import HALF_PRECISIONS
from d3tom_export.checkpoint.geometry import GEOMETRIES, geometry_config
from d3tom_export.process import peak_memory

from . import common, engine_options, options

if TYPE_CHECKING:
    from d3tom_export.bundle.folder import Bundle
    from d3tom_export.cpu.place import CpuPrecision

    from .engine_options import EngineRequest


@click.command("build", cls=common.Command)
@click.option(
    "--model",
    "model_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Checkpoint folder: config.json, safetensors, tokenizer.json.  [default: the bundled lavida-tiny]",
)
@click.option(
    "--geometry",
    type=click.Choice(GEOMETRIES),
    help="Build a model of this size with random weights instead of a checkpoint: for export, FLOPs and benchmarks.",
)
@click.option(
    "--weights",
    type=click.Choice(["link", "copy", "float16", "random", "sparse"]),
    help="How weights get into the bundle. Of a checkpoint: hard links to its files, copies, or copies in float16, for "
    "GPUs without bfloat16. Of a --geometry: random ones, or zeros in sparse files that take no disk.  [default: link "
    "with --model, copy for the bundled model, random with --geometry]",
)
@click.option(
    "--max-memory",
    "max_memory_gib",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory that the export and the self-check may take: what needs more is refused before it starts, or, where "
    "nobody asked for the self-check, left out. TensorRT's own builder keeps to no limit.  [default: what is free]",
)
@click.option(
    "--bundle",
    "bundle_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Add engines to this bundle instead of building one; nothing but engine options applies then.",
)
@options.merge_options
@options.cache_merge_options
@options.loop_options
@engine_options.engine_options
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
    help="Cut the embedding table to the tokenizer's length, as the release does, or keep every stored row.",
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
    metavar="N",
    help="Samples to validate against PyTorch before the bundle is declared done.  [default: 2 where memory holds the "
    "model in float32, else 0]",
)
@common.json_option
@click.pass_context
def command(
    context: click.Context,
    model_folder: Path | None,
    geometry: str | None,
    weights: Any,
    max_memory_gib: float | None,
    bundle_folder: Path | None,
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
    self_check: int | None,
    json_file: str | None,
    **other_options: Any,
) -> None:
    """Patch a checkpoint with D3ToM and export it to a bundle of ONNX stages.

    The stages are cut at --layer; picture sizes, prompt and answer lengths and the merge ratio stay free, so one
    bundle serves them all. Nothing is left behind when a build fails. Engines that are there and follow from the same
    graph, weights, sizes, settings and versions are kept.

    \b
    d3tom-export build --layer 2 --ratio 0.9
    d3tom-export build --model checkpoints/lavida --layer 3 --ratio 0.8 --output lavida-bundle
    d3tom-export build --geometry lavida-8b --weights sparse --layer 2 --ratio 0.9
    d3tom-export build --layer 2 --ratio 0.9 --kv-cache both --engine tensorrt-rtx --sm 89 --precision fp16
    d3tom-export build --bundle lavida-bundle --engine tensorrt --precision bf16
    d3tom-export build --layer 2 --ratio 0.9 --precision int8
    d3tom-export build --bundle lavida-bundle --precision fp16
    """
    if bundle_folder is not None:
        _refuse_other_options(context)
        precision = other_options["precision"]
        adds_graphs = other_options["engine"] == "none" and precision != "fp32"
        request = engine_options.engine_request(other_options)
        if adds_graphs:
            _add_graphs(bundle_folder, precision, json_file)
        else:
            _add_engines(bundle_folder, request, json_file)
        return
    from d3tom_export.bundle.manifest import ENGINES_FOLDER
    from d3tom_export.bundle.output import check_output_folder, new_folder, sweep
    from d3tom_export.bundled import bundled_model
    from d3tom_export.checkpoint.companions import check_companions
    from d3tom_export.checkpoint.folder import default_generation, open_checkpoint
    from d3tom_export.config import MergeConfig
    from d3tom_export.export.preflight import GIB, plan
    from d3tom_export.export.weights import check_linkable, demand_of, write_geometry

    started = time.perf_counter()
    weights = _weights_mode(weights, model_folder, geometry)
    source = bundled_model() if model_folder is None else model_folder
    name = geometry or source.resolve().name
    loops = options.loops_from(kv_cache, no_kv_cache)
    suffix = "-both" if len(loops) > 1 else "-cached" if "cached" in loops else ""
    output = output or Path(f"{name}-d3tom-l{layer}-r{ratio:g}{suffix}")
    # Everything that can be refused is refused before torch is imported and any work begins.
    cache = options.cache_merge_from(loops, remerge, cached_adaptive, restore_norm, text_targets)
    merge = MergeConfig(layer, ratio, schedule, select, aggregate, positions, cache)
    if "cached" in loops:
        merge.check_cached()
    precision = other_options["precision"]
    cpu_precisions: tuple[CpuPrecision, ...] = ("fp32", "int8") if precision == "int8" else ("fp32",)
    engines = engine_options.engine_request(other_options)
    half_precisions = (precision,) if engines is None and precision in HALF_PRECISIONS else ()
    for note in sweep(output):
        click.echo(note, err=True)
    check_output_folder(output, force)
    checkpoint = None if geometry else open_checkpoint(source, clip_vocabulary=clip_vocabulary)
    config = geometry_config(geometry) if geometry else checkpoint.config  # type: ignore[union-attr]
    merge.check_layer(config.language.n_layers)
    if checkpoint is not None:
        check_companions(source)
    if checkpoint is not None and weights == "link":
        check_linkable(checkpoint, output)
    progress = common.ConsoleProgress()
    progress("loading torch", 0, 1)

    from d3tom_export.export.build import build_bundle

    generation = options.generation_from(default_generation(config, None if geometry else source), other_options)
    if engines is not None:
        engines.options(config, generation)  # sizes beyond the model are refused before the export
        stored = {"BF16"} if checkpoint is None else {tensor.dtype for tensor in checkpoint.tensors.values()}
        engines.check_weights({"F16"} if weights == "float16" else stored)
    max_memory = None if max_memory_gib is None else int(max_memory_gib * GIB)
    needs = demand_of(checkpoint or config, weights, loops, engines.item_sizes if engines else ())
    planned = plan(needs, output, max_memory, self_check)
    click.echo(planned.describe(), err=True)
    with new_folder(output, force) as partial:
        if geometry:
            checkpoint = write_geometry(partial, geometry, weights, progress)
        assert checkpoint is not None
        bundle = build_bundle(
            checkpoint,
            merge,
            generation,
            partial,
            loops=loops,
            weights=weights,
            cpu_precisions=cpu_precisions,
            half_precisions=half_precisions,
            model_name=name,
            drop_token_after_image=drop_newline,
            self_check=(2 if self_check is None else self_check) if planned.self_check else 0,
            standard=planned.standard,
            streamed=planned.streamed,
            progress=progress,
            note=common.note,
        )
        built = None
        if engines is not None:
            # Those of the bundle that is replaced are taken over where they fit.
            built = _build_engines(bundle, engines, progress, previous=output / ENGINES_FOLDER)
    report = bundle.manifest.validation
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    # With links asked for, a converted file is still none.
    linked = sum(path.stat().st_size for path in output.glob("*.safetensors") if path.stat().st_nlink > 1)
    result = {
        "bundle": str(output),
        "model": name,
        "weights": bundle.manifest.weights,
        "loops": list(loops),
        "merge": merge.to_json(),
        "generation": bundle.manifest.generation.to_json(),
        "bytes": size,
        "linked_bytes": linked,
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory(),
        "validation": report,
        **({} if built is None else built.json),
        "passed": None if report is None else report["passed"],
    }
    common.write_json(json_file, result)
    links = f", {linked / 1e6:.1f} MB of them linked weights" if linked else ""
    peak = f"; peak memory {result['peak_memory_bytes'] / GIB:.2f} GiB" if result["peak_memory_bytes"] else ""
    common.say(json_file, f"Built {output} in {seconds:.1f} s ({size / 1e6:.1f} MB{links}{peak}).")
    common.warn_of_random_weights(bundle)
    if built is not None:
        common.say(json_file, "\n".join(built.lines))
    for half in half_precisions:
        common.say(json_file, _unproven(output, half))
    if merge.schedule == "adaptive" and merge.ratio < 0.5 and ("uncached" in loops or cache.adaptive):
        common.say(
            json_file,
            f"Note: the released adaptive schedule averages about 0.5 for any ratio below it; {merge.ratio:g} is only "
            "reached with --schedule fixed.",
        )
    if report is None:
        reason = "--self-check 0" if self_check == 0 else f"that needs {planned.lacking}"
        where = "" if self_check == 0 else " where there is as much"
        common.say(json_file, f"Not validated ({reason}). Run `d3tom-export validate`{where} before relying on it.")
    elif report["passed"]:
        common.say(
            json_file,
            f"Self-check passed: {report['samples']} answers, {report['steps']} steps, tokens and kept sets identical "
            f"to PyTorch, largest logit difference {report['max_abs_logit_error']:.1e}.",
        )
        if not report["standard_graphs"]:
            common.say(
                json_file,
                "The graphs for the CPU were run; the standard ones, which take "
                f"{planned.needs.standard / GIB:.1f} GiB more to load, were not.",
            )
        if "int8" in report:
            mere = "" if report["int8"]["passed"] else ", with weights that mean nothing"
            agreement = f"{report['int8']['token_agreement']:.1%} of its tokens agree with float32"
            common.say(json_file, f"int8: {agreement}{mere}.")
    else:
        raise click.ClickException(
            f"The bundle was written to {output} but did not pass its self-check: {_problems(report)} "
            f"(largest logit difference {report['max_abs_logit_error']}, allowed {report['logit_tolerance']:.0e}). "
            f"Its manifest says so. Run `d3tom-export validate {output}` for the whole report."
        )


def _problems(report: dict[str, Any]) -> str:
    return "; ".join(report["problems"][:3])


def _weights_mode(weights: str | None, model_folder: Path | None, geometry: str | None) -> str:
    """``--weights``, or its default; refuses what does not go with where the weights come from."""
    if geometry is not None and model_folder is not None:
        raise click.UsageError("--geometry makes a model with random weights and does not go with --model.")
    allowed = ("random", "sparse") if geometry else ("link", "copy", "float16")
    if weights is None:
        # The bundled model's files are small and belong to the package manager.
        return "random" if geometry else "copy" if model_folder is None else "link"
    if weights not in allowed:
        raise click.UsageError(
            f"--weights {weights} does not go with {'--geometry' if geometry else 'a checkpoint'}, which takes "
            f"one of {', '.join(allowed)}."
        )
    return weights


@dataclass(frozen=True)
class _Engines:
    """What a build of engines has to say."""

    lines: list[str]
    json: dict[str, Any]


def _build_engines(
    bundle: Bundle, request: EngineRequest, progress: common.ConsoleProgress, previous: Path | None = None
) -> _Engines:
    from d3tom_export.engines.build import build_engines

    config = request.options(bundle.config, bundle.manifest.generation)
    outcomes = build_engines(bundle, request.targets, config, previous=previous, progress=progress)
    return _Engines(
        engine_options.describe(bundle, config, outcomes),
        {"sizes": config.shapes.to_json(), "engines": [outcome.to_json() for outcome in outcomes]},
    )


def _add_engines(folder: Path, request: EngineRequest | None, json_file: str | None) -> None:
    """``build --bundle``"""
    from d3tom_export.bundle.folder import load_bundle

    if request is None:
        raise click.UsageError(
            "--bundle adds engines to a bundle: say which with --engine tensorrt or tensorrt-rtx; or --precision int8, "
            "fp16 or bf16 for ONNX Runtime's graphs."
        )
    started = time.perf_counter()
    progress = common.ConsoleProgress()
    built = _build_engines(load_bundle(folder), request, progress)
    seconds = time.perf_counter() - started
    common.write_json(json_file, {"bundle": str(folder), "seconds": round(seconds, 2), **built.json, "passed": True})
    common.say(json_file, "\n".join([f"Engines of {folder} are ready after {seconds:.1f} s.", *built.lines]))


def _add_graphs(folder: Path, precision: Any, json_file: str | None) -> None:
    """``build --bundle --precision int8``, or fp16 or bf16: graphs for ONNX Runtime."""
    from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
    from d3tom_export.bundle.folder import listed_files, load_bundle, write_manifest
    from d3tom_export.bundle.output import clear_half_written, locked, unlist
    from d3tom_export.cpu.tune import write_tuned
    from d3tom_export.engines.half import write_half

    bundle = load_bundle(folder)
    manifest = bundle.manifest
    with locked(folder) as alone:
        if alone:
            clear_half_written(folder)
        unlist(folder, lambda name: f"/{precision}/" in name)
        known = listed_files(folder)
        if precision in HALF_PRECISIONS:
            write_half(folder, manifest.stages, precision)
        else:
            write_tuned(folder, manifest.stages, bundle.config.language, manifest.merge, precision)
        bundle = replace(bundle, files=write_manifest(folder, manifest, known))
    bundle.check_graphs()
    for loop in manifest.loops if precision != "bf16" else ():  # whether they load is seen now, where the CPU can
        OnnxRuntimeBackend(bundle, loop, device="cpu", precision=precision)
    common.write_json(json_file, {"bundle": str(folder), "precision": precision, "passed": None})
    common.say(json_file, _unproven(folder, precision))


def _unproven(folder: Path, precision: str) -> str:
    """What there is to say of graphs that were written and not yet held against PyTorch."""
    where, against = {
        "int8": (" on the CPU", "says how many of its tokens agree with float32"),
        "fp16": ("", "holds them against PyTorch in fp16"),
        "bf16": (" on a GPU", "holds them against PyTorch in bf16, where there is one"),
    }[precision]
    return (
        f"{folder} has {precision} graphs for ONNX Runtime{where}: run with --precision {precision}. Not validated: "
        f"`d3tom-export validate {folder} --precision {precision}` {against}."
    )


def _refuse_other_options(context: click.Context) -> None:
    """With ``--bundle``, what concerns a new bundle is a mistake: it would be ignored."""
    allowed = {"bundle_folder", "json_file", *engine_options.OPTIONS}
    flags = [
        option.opts[0]
        for option in context.command.params
        if option.name not in allowed
        and option.expose_value
        and context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
    ]
    if flags:
        raise click.UsageError(
            f"{', '.join(flags)} concerns a new bundle and does not go with --bundle, which adds engines to one that "
            "is there."
        )
