"""``d3tom-export inspect``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import answer_options, common, options
from .sections import Section, heading

if TYPE_CHECKING:
    from d3tom_export.bundle.folder import Bundle, Verify
    from d3tom_export.config import CacheMergeConfig, GenerationConfig, Loop, MergeAt
    from d3tom_export.engines.memory import DeviceMemory
    from d3tom_export.engines.record import EngineRecord, Target
    from d3tom_export.prompt.settings import PromptSettings
    from d3tom_export.quantize.summary import WeightsSummary


def _cache_line(cache: CacheMergeConfig, merge_at: MergeAt) -> str:
    if merge_at == "prefill":
        return "  KV cache   merged once, at the prompt's prefill, fixed ratio"
    return (
        f"  KV cache   {'scheduled' if cache.adaptive else 'fixed'} ratio, merged anew {cache.remerge}, norms "
        f"{'restored' if cache.restore_norm else 'not restored'}, into "
        f"{'any kept row' if cache.text_targets else 'visual rows only'}"
    )


def _commits(generation: GenerationConfig) -> str:
    """How many tokens a step commits."""
    if generation.planned:
        return f"{generation.steps_per_block} steps each, {generation.schedule} schedule, {generation.remasking}"
    return f"committed by {answer_options.rule_words(generation)}"


def _prompts(prompt: PromptSettings) -> str:
    stops = f"answers stop at {', '.join(map(repr, prompt.stop))}" if prompt.stop else "no stop texts"
    return f"{'no system text' if prompt.system is None else 'with a system text'}, {stops}"


@click.command("inspect", cls=common.Command, first="visual-tokens by-hand verify json")
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@heading(Section.OUTPUT)
@click.option(
    "--visual-tokens",
    type=click.IntRange(min=1),
    metavar="V",
    help="Also show how many of V visual tokens each step keeps.",
)
@click.option(
    "--by-hand",
    is_flag=True,
    help="Also print the polygraphy and trtexec commands that build each engine without this tool.",
)
@options.verify_option("auto")
@common.json_option
def command(
    bundle_folder: Path, visual_tokens: int | None, by_hand: bool, verify: Verify, json_file: str | None
) -> None:
    """Show what a bundle holds: model, merging, every stage's tensors with their dynamic axes, weights, engines.

    Of weights in few bits it tells the format, their size, and what was left as it is and why.

    Verifies every file's size and sha256 first (--verify), and looks through every graph.
    """
    from d3tom_export.bundle.folder import load_bundle
    from d3tom_export.bundle.manifest import MANIFEST_FILE, stage_file
    from d3tom_export.engines.by_hand import commands
    from d3tom_export.engines.record import built_engines
    from d3tom_export.engines.stages import engine_stages
    from d3tom_export.errors import printable
    from d3tom_export.families.registry import family_of
    from d3tom_export.merging.schedule import kept_tokens, merge_ratio
    from d3tom_export.trust.documents import read_json

    bundle = load_bundle(bundle_folder, verify)
    bundle.check_graphs()
    common.warn_of_random_weights(bundle)
    manifest = bundle.manifest
    raw = read_json(bundle.folder / MANIFEST_FILE)
    generation, merge = manifest.generation, manifest.merge
    if visual_tokens is not None:
        steps, settings = generation.steps_per_block, {loop: merge.in_loop(loop == "cached") for loop in manifest.loops}
        # The first step of an answer has no decider yet, so it keeps everything; but for a prompt merged before it.
        raw["kept_per_step"] = {
            loop: [
                kept_tokens(visual_tokens, merge_ratio(own, step, steps) if step or own.merge_at == "prefill" else 0.0)
                for step in range(steps)
            ]
            for loop, own in settings.items()
        }
    engines = built_engines(bundle.folder, bundle.files)
    raw["engines"] = [
        record.to_json() | {"by_hand": commands(bundle.folder, record)}
        for records in engines.values()
        for record in records.values()
    ]
    raw["device_memory"] = [
        {"engines": target.folder, "loop": loop, **memory.to_json()}
        for target, records in engines.items()
        for loop, memory in _loops_memory(bundle, records).items()
    ]
    weights = common.weights_of(bundle)
    raw["quantization"] = None if weights is None else weights.to_json()
    common.write_json(json_file, raw)
    if json_file == "-":
        return

    language, vision = bundle.config.language, bundle.config.vision
    lines = [
        f"{bundle.folder}: {manifest.model_name}, {manifest.precision}, opset {manifest.opset}, "
        f"{' and '.join(manifest.loops)} loop{'s' if len(manifest.loops) > 1 else ''}",
        f"  family     {family_of(bundle.config).title}",
        f"  language   {language.n_layers} layers, width {language.d_model}, {language.n_heads} heads "
        f"({language.n_kv_heads} key/value), {language.vocab_rows} tokens",
        "  vision     none (language-only)"
        if vision is None
        else f"  vision     {vision.image_size} px, patch {vision.patch_size}, {vision.tokens_per_view} tokens a view",
        f"  merging    layer {merge.layer}, ratio {merge.ratio:g} {merge.schedule}, select {merge.select}, "
        f"aggregate {merge.aggregate}, {merge.positions} positions",
        *([_cache_line(merge.cache, merge.merge_at)] if "cached" in manifest.loops else []),
        *(["  sharing    questions can share a picture's prefill (--share-prefix)"] if manifest.shares_prefix else []),
        f"  answers    {generation.gen_length} tokens in blocks of {generation.block}, {_commits(generation)}",
        f"  prompts    {_prompts(manifest.prompt)}",
        *(_weight_lines(weights) if weights is not None else []),
        f"  made by    {', '.join(f'{name} {version}' for name, version in manifest.created_by.items())}",
    ]
    if manifest.validation is None:
        lines.append("  validated  no")
    else:
        verdict = "passed" if manifest.validation["passed"] else "FAILED"
        lines.append(
            f"  validated  {verdict} at build: {manifest.validation['samples']} samples, largest logit difference "
            f"{manifest.validation['max_abs_logit_error']}"
        )
    for loop, kept in raw.get("kept_per_step", {}).items():
        lines.append(
            f"  kept       {' '.join(map(str, kept))} of {visual_tokens}, per step of the first block, {loop} loop"
        )
    for key, spec in manifest.stages.items():
        size = raw["files"][stage_file(key)]["bytes"]
        loop = "" if spec.loop is None or len(manifest.loops) == 1 else f", {spec.loop} loop"
        lines.append(f"\n{stage_file(key)}  {size / 1e3:.0f} kB, {len(manifest.stage_weights[key])} weights{loop}")
        for arrow, tensors in (("<-", spec.inputs), ("->", spec.outputs)):
            for tensor in tensors:
                default = "" if tensor.default is None else f"  (optional, {tensor.default})"
                axes = ", ".join(map(str, tensor.axes))
                lines.append(f"  {arrow} {tensor.name:18} {tensor.dtype:8} ({axes}){default}")
    stages = engine_stages(manifest.stages, bundle.config, manifest.merge)
    for target, records in engines.items():
        lines += _engine_lines(bundle, target, records, len(stages), by_hand)
    # Names in it are those of whoever wrote the bundle.
    click.echo(
        "\n".join(line if line.isprintable() else printable(line) for text in lines for line in text.split("\n"))
    )


def _weight_lines(weights: WeightsSummary) -> list[str]:
    few, whole = weights.lines()
    return [f"  weights    {few}", f"  left whole {whole}"]


def _loops_memory(bundle: Bundle, records: dict[str, EngineRecord]) -> dict[Loop, DeviceMemory]:
    """Device memory of the loops whose engines are complete."""
    from d3tom_export.engines.memory import engines_memory
    from d3tom_export.engines.stages import engine_stages

    manifest = bundle.manifest
    stages = engine_stages(manifest.stages, bundle.config, manifest.merge)
    found = {}
    for loop in manifest.loops:
        keys = [key for key, spec in stages.items() if spec.loop in (None, loop)]
        if records.keys() >= set(keys):
            found[loop] = engines_memory([records[key] for key in keys], bundle.config.language)
    return found


def _engine_lines(
    bundle: Bundle, target: Target, records: dict[str, EngineRecord], stages: int, by_hand: bool
) -> list[str]:
    from d3tom_export.engines.by_hand import commands

    size = sum(record.plan_bytes for record in records.values())
    version = next(iter(records.values())).content["version"]
    merges = sorted({record.content["merge_op"] for record in records.values() if record.plugin_layers}) or ["onnx"]
    axes = {axis: sizes for record in records.values() for axis, sizes in record.content["sizes"].items()}
    lines = [
        f"\n{target.folder}/  {len(records)} of {stages} stages, {size / 1e6:.1f} MB, built by {target.toolkit} "
        f"{version}, --merge-op {', '.join(merges)}",
        "  serves     " + ", ".join(f"{axis} {axes[axis]}" for axis in "BVPGKLMC" if axis in axes),
    ]
    for loop, memory in _loops_memory(bundle, records).items():
        lines.append(
            f"  memory     {loop} loop: about {memory.total / 1e6:,.1f} MB on the device, {memory.weights / 1e6:,.1f} "
            f"of it plans, {memory.cache / 1e6:,.1f} keys and values"
        )
    if by_hand:
        lines += [f"  {command}" for record in records.values() for command in commands(bundle.folder, record)]
    return lines
