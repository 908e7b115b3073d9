"""``d3tom-export inspect``"""

from __future__ import annotations

from pathlib import Path

import click

from . import common


@click.command("inspect", cls=common.Command)
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--visual-tokens",
    type=click.IntRange(min=1),
    metavar="V",
    help="Also show how many of V visual tokens each step keeps.",
)
@common.json_option
def command(bundle_folder: Path, visual_tokens: int | None, json_file: str | None) -> None:
    """Show what a bundle holds: model, merging, every stage's tensors with their dynamic axes, weights, validation.

    Verifies every file's size and sha256 first.
    """
    from d3tom_export.bundle import MANIFEST_FILE, load_bundle, stage_file
    from d3tom_export.config import read_json
    from d3tom_export.merging.schedule import kept_tokens, merge_ratio

    bundle = load_bundle(bundle_folder)
    manifest = bundle.manifest
    raw = read_json(bundle.folder / MANIFEST_FILE)
    generation, merge = manifest.generation, manifest.merge
    kept = None
    if visual_tokens is not None:
        steps = generation.steps_per_block
        ratios = [merge_ratio(merge, step, steps) for step in range(steps)]
        # The first step of an answer has no decider yet, so it keeps everything.
        kept = [visual_tokens, *(kept_tokens(visual_tokens, ratio) for ratio in ratios[1:])]
        raw["kept_per_step"] = kept
    common.write_json(json_file, raw)
    if json_file == "-":
        return

    language, vision = bundle.config.language, bundle.config.vision
    lines = [
        f"{bundle.folder}: {manifest.model_name}, {manifest.precision}, opset {manifest.opset}, "
        f"{'with' if manifest.kv_cache else 'without'} KV cache",
        f"  language   {language.n_layers} layers, width {language.d_model}, {language.n_heads} heads "
        f"({language.n_kv_heads} key/value), {language.vocab_rows} tokens",
        "  vision     none (language-only)"
        if vision is None
        else f"  vision     {vision.image_size} px, patch {vision.patch_size}, {vision.tokens_per_view} tokens a view",
        f"  merging    layer {merge.layer}, ratio {merge.ratio:g} {merge.schedule}, select {merge.select}, "
        f"aggregate {merge.aggregate}, {merge.positions} positions",
        f"  answers    {generation.gen_length} tokens in blocks of {generation.block}, "
        f"{generation.steps_per_block} steps each, {generation.schedule} schedule, {generation.remasking}",
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
    if kept is not None:
        lines.append(f"  kept       {' '.join(map(str, kept))} of {visual_tokens}, per step of the first block")
    for name, spec in manifest.stages.items():
        size = raw["files"][stage_file(name)]["bytes"]
        lines.append(f"\n{stage_file(name)}  {size / 1e3:.0f} kB, {len(manifest.stage_weights[name])} weight tensors")
        for arrow, tensors in (("<-", spec.inputs), ("->", spec.outputs)):
            for tensor in tensors:
                default = "" if tensor.default is None else f"  (optional, {tensor.default})"
                axes = ", ".join(map(str, tensor.axes))
                lines.append(f"  {arrow} {tensor.name:18} {tensor.dtype:8} ({axes}){default}")
    click.echo("\n".join(lines))
