"""Share of held-out scenes answered exactly right, with and without KV cache and merging: the README's accuracy table.

One bundle serves most rows: loop, merge ratio and how often a cache is merged are chosen when it runs. What is part of
the graphs, other selection policies and two options of the cached merge (``--variants``), runs on the eager model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from d3tom_export.backends.select import open_backend
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.config import Loop, MergeConfig, SelectionPolicy
from d3tom_export.loop.backend import Backend
from d3tom_export.pipeline import Reader, embed_sample, run_loop
from d3tom_export.process import claim
from d3tom_export.prompt.samples import SAMPLES_FILE, Sample, load_samples

RATIOS = (0.5, 0.7, 0.9)
POLICIES: tuple[SelectionPolicy, ...] = ("fastv", "uniform", "random")
PREFILL_POLICIES: tuple[SelectionPolicy, ...] = ("decider", "uniform")
CACHE_OPTIONS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"remerge": "per-block"}, "merged once"),
    ({"adaptive": True}, "adaptive"),
)
"""Options of the cached loop that need no other graphs."""
CACHE_VARIANTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"restore_norm": False}, "norms not restored"),
    ({"text_targets": False}, "visual targets only"),
    ({"restore_norm": False, "text_targets": False}, "norms not restored, visual targets only"),
)
"""Options of the cached loop that are part of the graphs."""


@dataclass(frozen=True)
class Row:
    """One configuration's result."""

    backend: str
    loop: str
    merging: str
    exact_match: float
    mean_kept: float
    """Share of visual tokens that a step keeps, averaged over all steps but each answer's first."""


def measure(backend: Backend, bundle: Bundle, samples: Sequence[Sample], merge: MergeConfig, label: str) -> Row:
    """Answer every sample under ``merge`` with the bundle's generation settings."""
    generation, mask_token_id = bundle.manifest.generation, bundle.config.language.mask_token_id
    reader = Reader.of_bundle(bundle)
    right, kept = 0, []
    for sample in samples:
        prompt = embed_sample(backend, sample, reader, generation)
        records = list(run_loop(backend, prompt, mask_token_id, generation, merge))
        kept += [record.keep / len(prompt.visual_positions) for record in records[1:]]
        right += reader.answer(records[-1], generation).text == sample.answer
    loop = "cached" if backend.kv_cache else "uncached"
    return Row(backend.name, loop, label, right / len(samples), sum(kept) / len(kept))


def configurations(
    base: MergeConfig, loops: Sequence[Loop], variants: bool
) -> list[tuple[str, Loop, MergeConfig, str]]:
    """What to measure: backend, loop, merging and its label; both ways to merge with a cache, of a bundle for both."""
    rows: list[tuple[str, Loop, MergeConfig, str]] = []
    at_prefill = base.merge_at == "prefill"
    base = replace(base, merge_at="step")
    for loop in loops:
        rows.append(("onnxruntime", loop, replace(base, schedule="none"), "none"))
        rows += [
            ("onnxruntime", loop, replace(base, ratio=ratio, schedule="adaptive"), f"D3ToM, ratio {ratio}")
            for ratio in RATIOS
        ]
        if loop == "cached":
            rows += [
                ("onnxruntime", loop, replace(base, cache=replace(base.cache, **change)), f"D3ToM, ratio 0.9, {label}")
                for change, label in CACHE_OPTIONS
            ]
        if loop == "cached" and at_prefill:
            prefill = replace(base, merge_at="prefill")
            rows += [
                ("onnxruntime", loop, replace(prefill, ratio=ratio, select=policy), f"prefill, {policy}, ratio {ratio}")
                for policy in PREFILL_POLICIES
                for ratio in RATIOS
            ]
    if variants:
        rows += [
            ("pytorch", "uncached", replace(base, ratio=ratio, select=policy), f"{policy}, ratio {ratio}")
            for policy in POLICIES
            for ratio in RATIOS
        ]
        rows += [
            ("pytorch", "cached", replace(base, cache=replace(base.cache, **change)), f"D3ToM, ratio 0.9, {label}")
            for change, label in CACHE_VARIANTS
        ]
    return rows


@click.command()
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(exists=True, path_type=Path))
@click.option("--samples", type=click.IntRange(min=1), help="Held-out scenes.  [default: all]")
@click.option("--variants", is_flag=True, help="Also measure, on the eager model, what needs other graphs.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(bundle_folder: Path, samples: int | None, variants: bool, json_file: Path | None) -> None:
    """Measure exact match on BUNDLE's held-out samples and print a Markdown table."""
    bundle = load_bundle(bundle_folder)
    scenes = load_samples(bundle.folder / SAMPLES_FILE, samples)
    base = bundle.manifest.merge
    rows = []
    generation = bundle.manifest.generation
    steps = generation.total_steps
    sampling = "greedy" if generation.greedy else f"temperature {generation.temperature}, {generation.remasking}"
    click.echo(f"{len(scenes)} held-out scenes, l* = {base.layer}, {sampling}, {steps} steps")
    click.echo("\n| loop | merging | backend | exact match | visual tokens kept |")
    click.echo("| --- | --- | --- | --- | --- |")
    opened: dict[tuple[str, Loop, MergeConfig | None], Backend] = {}
    for name, loop, merge, label in configurations(base, bundle.manifest.loops, variants):
        key = (name, loop, merge if name == "pytorch" else None)
        if key not in opened:
            # The oracle takes its kind of merge from the manifest, ONNX Runtime has it in its graphs.
            source = replace(bundle, manifest=replace(bundle.manifest, merge=merge)) if name == "pytorch" else bundle
            opened[key] = open_backend(name, source, loop, device="cpu")
        row = measure(opened[key], bundle, scenes, merge, label)
        rows.append(row)
        click.echo(f"| {row.loop} | {row.merging} | {row.backend} | {row.exact_match:.1%} | {row.mean_kept:.0%} |")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    claim()
    main()
