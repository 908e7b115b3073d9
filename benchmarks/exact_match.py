"""Share of held-out scenes answered exactly right, unmerged and merged: the README's accuracy table.

One bundle serves every row: the merge ratio is chosen when the loop runs. Rows of other selection policies
(``--policies``) run on the eager model, because the policy is part of a bundle's graphs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from d3tom_export.backends.select import open_backend
from d3tom_export.bundle import Bundle, load_bundle
from d3tom_export.config import MergeConfig
from d3tom_export.pipeline import Backend, Reader, run_loop
from d3tom_export.samples import SAMPLES_FILE, Sample, load_samples

RATIOS = (0.5, 0.7, 0.9)
POLICIES = ("fastv", "uniform", "random")


@dataclass(frozen=True)
class Row:
    """One configuration's result."""

    backend: str
    merging: str
    exact_match: float
    mean_kept: float
    """Share of visual tokens that a step keeps, averaged over all steps but each answer's first."""


def measure(backend: Backend, bundle: Bundle, samples: Sequence[Sample], merge: MergeConfig, label: str) -> Row:
    """Answer every sample under ``merge`` with the bundle's generation settings."""
    manifest = bundle.manifest
    reader = Reader.of_bundle(bundle)
    right, kept = 0, []
    for sample in samples:
        pictures = [] if sample.picture is None else [sample.picture]
        prompt = reader.read(backend, sample.question, pictures, manifest.generation)
        mask_token_id = bundle.config.language.mask_token_id
        records = list(run_loop(backend, prompt, mask_token_id, manifest.generation, merge))
        kept += [record.keep / len(prompt.visual_positions) for record in records[1:]]
        right += reader.text(records[-1].tokens[0]) == sample.answer
    return Row(backend.name, label, right / len(samples), sum(kept) / len(kept))


@click.command()
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(exists=True, path_type=Path))
@click.option("--samples", type=click.IntRange(min=1), help="Held-out scenes.  [default: all]")
@click.option("--policies", is_flag=True, help="Also measure the comparison policies, which drop instead of merging.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(bundle_folder: Path, samples: int | None, policies: bool, json_file: Path | None) -> None:
    """Measure exact match on BUNDLE's held-out samples and print a Markdown table."""
    bundle = load_bundle(bundle_folder)
    scenes = load_samples(bundle.folder / SAMPLES_FILE, samples)
    base = bundle.manifest.merge
    configurations: list[tuple[str, MergeConfig, str]] = [
        ("onnxruntime", replace(base, schedule="none"), "none"),
        *(
            ("onnxruntime", replace(base, ratio=ratio, schedule="adaptive"), f"D3ToM, ratio {ratio}")
            for ratio in RATIOS
        ),
    ]
    if policies:
        configurations += [
            ("pytorch", replace(base, ratio=ratio, schedule="adaptive", select=policy), f"{policy}, ratio {ratio}")
            for policy in POLICIES
            for ratio in RATIOS
        ]
    rows = []
    generation = bundle.manifest.generation
    steps = generation.gen_length // generation.block * generation.steps_per_block
    sampling = "greedy" if generation.greedy else f"temperature {generation.temperature}, {generation.remasking}"
    click.echo(f"{len(scenes)} held-out scenes, l* = {base.layer}, {sampling}, {steps} steps")
    click.echo("\n| merging | backend | exact match | visual tokens kept |")
    click.echo("| --- | --- | --- | --- |")
    opened: dict[tuple[str, str], Backend] = {}
    for name, merge, label in configurations:
        key = (name, merge.select)
        if key not in opened:
            source = (
                bundle if name == "onnxruntime" else replace(bundle, manifest=replace(bundle.manifest, merge=merge))
            )
            opened[key] = open_backend(name, source, device="cpu")
        row = measure(opened[key], bundle, scenes, merge, label)
        rows.append(row)
        click.echo(f"| {row.merging} | {row.backend} | {row.exact_match:.1%} | {row.mean_kept:.0%} |")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
