"""Share of held-out scenes answered exactly right, with and without KV cache and merging: the README's accuracy table.

One bundle serves most rows: loop, merge ratio and how often a cache is merged are chosen when it runs. What is part of
the graphs, other selection policies and two options of the cached merge (``--variants``), runs on the eager model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
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
PREFILL_VARIANTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "masks decide, sum"),
    ({"aggregate": "mean"}, "masks decide, mean"),
    ({"select": "uniform"}, "uniform, sum"),
    ({"select": "uniform", "aggregate": "mean"}, "uniform, mean"),
)
"""Ways to merge a prompt at its prefill, which are part of the graphs."""
EXIT: dict[str, Any] = {"early_exit": True}
FILLED: dict[str, Any] = EXIT | {"fill_after_end": True}
FAST: tuple[tuple[dict[str, Any], str], ...] = (
    (FILLED, "filled after the end"),
    (EXIT | {"commit": "threshold"}, "threshold 0.9"),
    (EXIT | {"commit": "threshold", "threshold": 0.99}, "threshold 0.99"),
    (EXIT | {"commit": "threshold", "threshold": 0.7}, "threshold 0.7"),
    (EXIT | {"commit": "factor"}, "factor 1"),
    (EXIT | {"commit": "frechet"}, "frechet"),
    (FILLED | {"commit": "threshold"}, "threshold 0.9, filled after the end"),
)
"""What commits tokens, beside the plan."""


@dataclass(frozen=True)
class Row:
    """One configuration's result."""

    backend: str
    loop: str
    merging: str
    exact_match: float
    mean_kept: float
    """Share of visual tokens that a step keeps, averaged over all steps but each answer's first; 1 without such."""
    steps: float
    """Mean number of steps that were run."""


@dataclass(frozen=True)
class Configuration:
    """What to measure."""

    backend: str
    loop: Loop
    merge: MergeConfig
    label: str
    generation: dict[str, Any] = field(default_factory=dict)
    """Changes of the bundle's settings."""


def measure(backend: Backend, bundle: Bundle, samples: Sequence[Sample], measured: Configuration) -> Row:
    """Answer every sample as ``measured`` says, with the bundle's generation settings for the rest."""
    mask_token_id, merge = bundle.config.language.mask_token_id, measured.merge
    reader = Reader.of_bundle(bundle)
    generation = replace(bundle.manifest.generation, end_ids=reader.end_ids).changed(**measured.generation)
    right, steps, kept = 0, 0, []
    for sample in samples:
        prompt = embed_sample(backend, sample, reader, generation)
        records = list(run_loop(backend, prompt, mask_token_id, generation, merge))
        kept += [record.keep / len(prompt.visual_positions) for record in records[1:]]
        steps += len(records)
        right += reader.answer(records[-1], generation).text == sample.answer
    loop = "cached" if backend.kv_cache else "uncached"
    mean_kept = sum(kept) / len(kept) if kept else 1.0
    return Row(backend.name, loop, measured.label, right / len(samples), mean_kept, steps / len(samples))


def configurations(base: MergeConfig, loops: Sequence[Loop], variants: bool) -> list[Configuration]:
    """What merging costs, both ways of merging with a cache of a bundle for both.

    ``variants`` are what needs other graphs.
    """
    at_prefill = base.merge_at == "prefill"
    base = replace(base, merge_at="step")
    rows: list[Configuration] = []
    for loop in loops:
        rows.append(Configuration("onnxruntime", loop, replace(base, schedule="none"), "none"))
        rows += [
            Configuration("onnxruntime", loop, replace(base, ratio=ratio, schedule="adaptive"), f"D3ToM, ratio {ratio}")
            for ratio in RATIOS
        ]
        if loop == "cached":
            rows += [
                Configuration("onnxruntime", loop, replace(base, cache=replace(base.cache, **change)), _merged(label))
                for change, label in CACHE_OPTIONS
            ]
        if loop == "cached" and at_prefill:
            prefill = replace(base, merge_at="prefill")
            rows += [
                Configuration(
                    "onnxruntime",
                    loop,
                    replace(prefill, ratio=ratio, select=policy),
                    f"prefill, {policy}, ratio {ratio}",
                )
                for policy in PREFILL_POLICIES
                for ratio in RATIOS
            ]
    if variants:
        rows += [
            Configuration("pytorch", "uncached", replace(base, ratio=ratio, select=policy), f"{policy}, ratio {ratio}")
            for policy in POLICIES
            for ratio in RATIOS
        ]
        rows += [
            Configuration("pytorch", "cached", replace(base, cache=replace(base.cache, **change)), _merged(label))
            for change, label in CACHE_VARIANTS
        ]
    return rows


def fast_configurations(base: MergeConfig, loops: Sequence[Loop], variants: bool) -> list[Configuration]:
    """What answers in few steps cost, as :func:`configurations` at the bundle's ratio."""
    base = replace(base, merge_at="step")
    unmerged, looking = replace(base, schedule="none"), replace(base, deciders="looking")
    rows: list[Configuration] = []
    for loop in loops:
        rows += [
            Configuration("onnxruntime", loop, unmerged, "none", EXIT),
            *(Configuration("onnxruntime", loop, unmerged, f"none, {label}", change) for change, label in FAST),
            Configuration("onnxruntime", loop, base, _merged(""), EXIT),
            *(Configuration("onnxruntime", loop, base, _merged(label), change) for change, label in FAST),
            Configuration("onnxruntime", loop, looking, _merged("deciders that look"), EXIT),
            Configuration("onnxruntime", loop, looking, _merged("looking, filled after the end"), FILLED),
        ]
    if variants:
        rows += [
            Configuration(
                "pytorch",
                "cached",
                replace(base, merge_at="prefill", **change),
                f"prefill, {label}",
                EXIT | {"commit": "threshold"},
            )
            for change, label in PREFILL_VARIANTS
        ]
    return rows


def _merged(label: str) -> str:
    return f"D3ToM, ratio 0.9{label and ', '}{label}"


@click.command()
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(exists=True, path_type=Path))
@click.option("--samples", type=click.IntRange(min=1), help="Held-out scenes.  [default: all]")
@click.option("--variants", is_flag=True, help="Also measure, on the eager model, what needs other graphs.")
@click.option(
    "--fast", is_flag=True, help="Commit rules, filling after the end, deciders that look, in place of ratios."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(bundle_folder: Path, samples: int | None, variants: bool, fast: bool, json_file: Path | None) -> None:
    """Measure exact match on BUNDLE's held-out samples and print a Markdown table."""
    bundle = load_bundle(bundle_folder)
    scenes = load_samples(bundle.folder / SAMPLES_FILE, samples)
    base = bundle.manifest.merge
    rows = []
    generation = bundle.manifest.generation
    steps = generation.total_steps
    sampling = "greedy" if generation.greedy else f"temperature {generation.temperature}, {generation.remasking}"
    click.echo(f"{len(scenes)} held-out scenes, l* = {base.layer}, {sampling}, {steps} steps")
    click.echo("\n| loop | merging | backend | exact match | visual tokens kept | steps |")
    click.echo("| --- | --- | --- | --- | --- | --- |")
    opened: dict[tuple[str, Loop, MergeConfig | None], Backend] = {}
    for measured in (fast_configurations if fast else configurations)(base, bundle.manifest.loops, variants):
        name, loop, merge = measured.backend, measured.loop, measured.merge
        key = (name, loop, merge if name == "pytorch" else None)
        if key not in opened:
            # The oracle takes its kind of merge from the manifest, ONNX Runtime has it in its graphs.
            source = replace(bundle, manifest=replace(bundle.manifest, merge=merge)) if name == "pytorch" else bundle
            opened[key] = open_backend(name, source, loop, device="cpu")
        row = measure(opened[key], bundle, scenes, measured)
        rows.append(row)
        click.echo(
            f"| {row.loop} | {row.merging} | {row.backend} | {row.exact_match:.1%} | {row.mean_kept:.0%} | "
            f"{row.steps:.2f} |"
        )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    claim()
    main()
