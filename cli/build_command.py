"""``d3tom-export build``"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from d3tom_export.checkpoint.geometry import GEOMETRIES
from d3tom_export.config import CacheMergeConfig, MergeConfig
from d3tom_export.export.preflight import GIB
from d3tom_export.export.request import BuildRequest, EngineRequest, ModelSource, StageRequest

from . import answer_options, common, engine_options, options, quantize_options
from .sections import Section, heading

if TYPE_CHECKING:
    from d3tom_export.export.build import BuildResult


@click.command(
    "build", cls=common.Command, first="model layer ratio kv-cache gen-length precision quantize engine output force"
)
@heading(Section.SOURCE)
@click.option(
    "--model",
    "model_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Checkpoint folder: config.json, safetensors, tokenizer.json.  [default: the bundled lavida-tiny]",
)
@options.vision_tower_option
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
@quantize_options.build_options
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
@answer_options.generation_options
@heading(Section.OUTPUT)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Bundle folder to write.  [default: MODEL-d3tom-lLAYER-rRATIO[-cached|-both][-prefill][-shared] in the "
    "current folder]",
)
@click.option("--force", is_flag=True, help="Replace the output folder if it is a bundle.")
@heading(Section.SOURCE)
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
@heading(Section.CHECKS)
@click.option(
    "--max-memory",
    "max_memory_gib",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory that the export and the self-check may take: what needs more is refused before it starts, or, where "
    "nobody asked for the self-check, left out. TensorRT's own builder keeps to no limit.  [default: what is free]",
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
def command(context: click.Context, bundle_folder: Path | None, json_file: str | None, **given: Any) -> None:
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
        _add(bundle_folder, given, json_file)
        return
    request = _request(given)
    from d3tom_export.export.build import build

    result = build(request, common.ConsoleProgress(), lambda sentence: click.echo(sentence, err=True))
    common.write_json(json_file, _as_json(result))
    common.say(json_file, _built(result))
    common.warn_of_random_weights(result.bundle)
    for line in (*_written(request, result), *_checked(request, result)):
        common.say(json_file, line)
    report = result.validation
    if report is not None and not report["passed"]:
        output, allowed = result.bundle.folder, "more than the roundings of inputs do"
        if "logit_tolerance" in report:
            allowed = f"allowed {report['logit_tolerance']:.0e}"
        raise click.ClickException(
            f"The bundle was written to {output} but did not pass its self-check: {'; '.join(report['problems'][:3])} "
            f"(largest logit difference {report['max_abs_logit_error']}, {allowed}). "
            f"Its manifest says so. Run `d3tom-export validate {output}` for the whole report."
        )


def _request(given: dict[str, Any]) -> BuildRequest:
    """What the options ask for."""
    source = ModelSource(
        given["model_folder"],
        given["geometry"],
        given["weights"],
        given["clip_vocabulary"],
        given["vision_tower"],
    )
    loops = options.loops_from(given["kv_cache"], given["no_kv_cache"])
    policy = {"adaptive": "cached_adaptive", **{name: name for name in ("restore_norm", "text_targets", "remerge")}}
    cache = CacheMergeConfig(**{field: given[name] for field, name in policy.items()})
    names = ("layer", "ratio", "schedule", "select", "deciders", "aggregate", "positions", "merge_at")
    merging = {name: given[name] for name in names}
    precision, max_memory = given["precision"], given["max_memory_gib"]
    engines, quantize = engine_options.engine_request(given), quantize_options.quantize_from(given)
    return BuildRequest(
        source,
        StageRequest(
            MergeConfig(**merging, cache=cache),
            loops,
            (precision,) if engines is None and precision != "fp32" else (),
            given["drop_newline"],
            given["share_prefix"],
            quantize,
        ),
        given["output"],
        given["force"],
        answer_options.given_generation(given),
        engines,
        given["self_check"],
        None if max_memory is None else int(max_memory * GIB),
    )


def _as_json(result: BuildResult) -> dict[str, Any]:
    manifest = result.bundle.manifest
    return {
        "bundle": str(result.bundle.folder),
        "model": manifest.model_name,
        "weights": manifest.weights,
        "loops": list(manifest.loops),
        "merge": manifest.merge.to_json(),
        "shares_prefix": manifest.shares_prefix,
        "generation": manifest.generation.to_json(),
        "bytes": result.bytes,
        "linked_bytes": result.linked_bytes,
        "seconds": round(result.seconds, 2),
        "peak_memory_bytes": result.peak_memory_bytes,
        "validation": result.validation,
        **({} if result.engines is None else result.engines.to_json()),
        "passed": result.passed,
    }


def _built(result: BuildResult) -> str:
    links = f", {result.linked_bytes / 1e6:.1f} MB of them linked weights" if result.linked_bytes else ""
    peak = f"; peak memory {result.peak_memory_bytes / GIB:.2f} GiB" if result.peak_memory_bytes else ""
    size = f"{result.bytes / 1e6:.1f} MB{links}{peak}"
    return f"Built {result.bundle.folder} in {result.seconds:.1f} s ({size})."


def _written(request: BuildRequest, result: BuildResult) -> list[str]:
    """What there is to say of engines and graphs, and of merging that will not be what it looks like."""
    lines = [] if result.engines is None else engine_options.describe(result.engines)
    lines += [_unproven(result.bundle.folder, half) for half in request.stages.half_precisions]
    merge = request.stages.merge
    adapts = "uncached" in request.stages.loops or merge.in_loop(True).schedule == "adaptive"
    if merge.schedule == "adaptive" and merge.ratio < 0.5 and adapts:
        lines.append(
            f"Note: the released adaptive schedule averages about 0.5 for any ratio below it; {merge.ratio:g} is only "
            "reached with --schedule fixed."
        )
    return lines


def _checked(request: BuildRequest, result: BuildResult) -> list[str]:
    """What the self-check proved, where it passed, or why there was none."""
    report = result.validation
    if report is None:
        asked_off = request.self_check == 0
        reason = "--self-check 0" if asked_off else f"that needs {result.plan.lacking}"
        where = "" if asked_off else " where there is as much"
        return [f"Not validated ({reason}). Run `d3tom-export validate`{where} before relying on it."]
    if not report["passed"]:
        return []
    same = "tokens and kept sets identical to PyTorch"
    if "token_agreement" in report:  # inputs of products are rounded, which the last digit of a sum may turn
        same = f"{report['token_agreement']:.1%} of the tokens and all kept sets are PyTorch's"
    lines = [
        f"Self-check passed: {report['samples']} answers, {report['steps']} steps, {same}, largest logit difference "
        f"{report['max_abs_logit_error']:.1e}."
    ]
    if not report["standard_graphs"]:
        why = f"which take {result.plan.needs.standard / GIB:.1f} GiB more to load"
        if not result.bundle.manifest.standard_on_cpu:
            why = "whose weights in nvfp4 ONNX Runtime has no CPU kernels for"
        lines.append(f"The graphs for the CPU were run; the standard ones, {why}, were not.")
    if "int8" in report:
        mere = "" if report["int8"]["passed"] else ", with weights that mean nothing"
        lines.append(f"int8: {report['int8']['token_agreement']:.1%} of its tokens agree with float32{mere}.")
    return lines


def _add(folder: Path, given: dict[str, Any], json_file: str | None) -> None:
    """``build --bundle``"""
    precision, adds_graphs = given["precision"], given["engine"] == "none" and given["precision"] != "fp32"
    request = engine_options.engine_request(given)
    if adds_graphs:
        from d3tom_export.export.add import add_graphs

        add_graphs(folder, precision)
        common.write_json(json_file, {"bundle": str(folder), "precision": precision, "passed": None})
        common.say(json_file, _unproven(folder, precision))
    else:
        _add_engines(folder, request, json_file)


def _add_engines(folder: Path, request: EngineRequest | None, json_file: str | None) -> None:
    if request is None:
        raise click.UsageError(
            "--bundle adds engines to a bundle: say which with --engine tensorrt or tensorrt-rtx; or --precision int8, "
            "fp16 or bf16 for ONNX Runtime's graphs."
        )
    from d3tom_export.export.add import add_engines

    started = time.perf_counter()
    built = add_engines(folder, request, common.ConsoleProgress())
    seconds = time.perf_counter() - started
    result = {"bundle": str(folder), "seconds": round(seconds, 2), **built.to_json(), "passed": True}
    common.write_json(json_file, result)
    lines = [f"Engines of {folder} are ready after {seconds:.1f} s.", *engine_options.describe(built)]
    common.say(json_file, "\n".join(lines))


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
