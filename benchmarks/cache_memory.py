"""Peak resident memory of cached answers over 8, 32 and 128 steps, plain and merged, at LaViDa's proportions in small.

Every figure is what one answer adds to a fresh process with the bundle loaded: up to its second step, the first that
merges, prefill included, and in the steps after it. Merged at the prefill, it is a bundle built for that.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import click

from benchmarks.proportions import TEXT_TOKENS, VISUAL_TOKENS, build
from d3tom_export.bundle.folder import load_bundle
from d3tom_export.config import CacheMergeConfig, GenerationConfig, MergeAt, MergeConfig
from d3tom_export.cost.bench import cache_traffic, peak_memory, random_prompt
from d3tom_export.cost.combinations import Combination
from d3tom_export.cost.flops import Workload, prompt_plan, step_merges

ANSWER, STEPS = 128, (8, 32, 128)


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(json_file: Path | None) -> None:
    """Measure and print a Markdown table."""
    with tempfile.TemporaryDirectory() as scratch:
        merge, folders = MergeConfig(2, 0.9, "fixed"), {}
        for merge_at in get_args(MergeAt):
            built_for = replace(merge, merge_at=merge_at)
            place = Path(scratch) / merge_at
            place.mkdir()
            folders[merge_at] = build(place, built_for, GenerationConfig(ANSWER), ["cached"])
        config = load_bundle(folders["step"]).config.language
        prompt = random_prompt(config, TEXT_TOKENS, VISUAL_TOKENS)
        work = Workload(TEXT_TOKENS + VISUAL_TOKENS, VISUAL_TOKENS, ANSWER)
        rows = []
        heads = " | ".join(f"{steps} steps: first / later" for steps in STEPS)
        click.echo(f"Peaks in MiB\n\n| cached loop | full cache | merged | {heads} |")
        click.echo("| --- " * (3 + len(STEPS)) + "|")
        for label, change in (
            ("unmerged", {"schedule": "none"}),
            ("ratio 0.9", {"ratio": 0.9}),
            ("ratio 0.5", {"ratio": 0.5}),
            ("ratio 0.1", {"ratio": 0.1}),
            ("ratio 0.5, adaptive", {"ratio": 0.5, "schedule": "adaptive", "cache": CacheMergeConfig(adaptive=True)}),
            ("ratio 0.9, per block", {"ratio": 0.9, "cache": CacheMergeConfig(remerge="per-block")}),
            ("ratio 0.9, at the prefill", {"ratio": 0.9, "merge_at": "prefill"}),
            ("ratio 0.5, at the prefill", {"ratio": 0.5, "merge_at": "prefill"}),
        ):
            used = replace(merge, **change)  # type: ignore[arg-type]
            combination = Combination("cached", "unmerged" if used.schedule == "none" else used.merge_at)
            peaks = {}
            for steps in STEPS:
                generation = GenerationConfig(ANSWER, step_ratio=steps / ANSWER)
                peak = peak_memory(folders[used.merge_at], "onnxruntime", "cpu", combination, prompt, generation, used)
                assert peak is not None, "peak memory is read from Linux's /proc"
                peaks[steps] = [(part - peak.loaded) / 2**20 for part in (peak.first, peak.later)]
            last, plan = step_merges(used, generation, VISUAL_TOKENS)[-1], prompt_plan(used, VISUAL_TOKENS)
            sizes = cache_traffic(config, work, merge.layer, last, plan)
            full, merged = (sizes[name] / 2**20 for name in ("full", "merged"))
            rows.append({"merging": label, "full_mib": full, "merged_mib": merged, "peaks_mib": peaks})
            cells = " | ".join(f"{first:.0f} / {later:.0f}" for first, later in peaks.values())
            click.echo(f"| {label} | {full:.1f} | {merged:.1f} | {cells} |")
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
