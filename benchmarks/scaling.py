"""How a step's time grows with visual tokens, answer length and layers, merged and unmerged, against the FLOP model.

    python -m benchmarks.scaling [--repeats N] [--json FILE]

ONNX Runtime, float32, one factor at a time around LaViDa's proportions in small. Single steps are timed, not answers:
at the ratio that an adaptive answer has on average, merged and unmerged in turn. Where a measured ratio falls
short of its FLOP-ideal, the step spends its time on something other than matrix products, or on smaller ones.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.loops import machine
from benchmarks.proportions import LAVIDA, SMALL, Proportions, build
from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.config import LOOPS, GenerationConfig, Loop
from d3tom_export.cost.bench import random_prompt, spread, time_in_turns
from d3tom_export.cost.flops import Workload, cached_step, uncached_step
from d3tom_export.loop.denoise import Session, StepRequest
from d3tom_export.merging.schedule import kept_tokens
from d3tom_export.process import claim
from d3tom_export.progress import Progress, no_progress


@dataclass(frozen=True)
class Point:
    """One measurement's sizes."""

    factor: str
    """What is varied: "V", "G" or "layers"."""
    visual_tokens: int
    answer_tokens: int
    layers: int

    @property
    def value(self) -> int:
        return {"V": self.visual_tokens, "G": self.answer_tokens, "layers": self.layers}[self.factor]


@dataclass(frozen=True)
class Sweep:
    """The values of each factor; the others stay at the proportions' own."""

    visual_tokens: tuple[int, ...] = (256, 512, 1008, 2048, 4096)
    answer_tokens: tuple[int, ...] = (32, 64, 128, 256)
    layers: tuple[int, ...] = (6, 12, 24)

    def points(self, sizes: Proportions) -> list[Point]:
        own = Point("V", sizes.visual_tokens, sizes.generation.gen_length, sizes.config["n_layers"])
        return [
            *(replace(own, visual_tokens=value) for value in self.visual_tokens),
            *(replace(own, factor="G", answer_tokens=value) for value in self.answer_tokens),
            *(replace(own, factor="layers", layers=value) for value in self.layers),
        ]


CACHED_REPEATS = 5
"""Times as many steps with a KV cache: they are short, and a disturbance weighs more."""

QUICK = Sweep((16, 48), (4, 8), (3, 4))


def request(point: Point, mask_token_id: int, keep: int | None) -> StepRequest:
    """A step of an answer all of masks, the first two positions deciding; ``keep`` None merges nothing."""
    shape = (1, point.answer_tokens)
    deciders = np.zeros(shape, dtype=np.bool_)
    deciders[:, :2] = True
    return StepRequest(
        answer_ids=np.full(shape, mask_token_id, dtype=np.int64),
        deciders=deciders,
        merge=keep is not None,
        keep=point.visual_tokens if keep is None else keep,
        cache_merge="anew",
        last_merge=False,
        logits=False,
    )


def _steps(session: Session, wanted: StepRequest) -> Iterator[object]:
    yield session.step(wanted)


def measure(
    backend: OnnxRuntimeBackend, bundle: Bundle, sizes: Proportions, loop: Loop, point: Point, repeats: int
) -> dict[str, Any]:
    """One row: a step merged and unmerged, in turns, one uncounted step of each before."""
    config = bundle.config.language
    prompt = random_prompt(config, sizes.text_tokens, point.visual_tokens)
    keep = kept_tokens(point.visual_tokens, sizes.merge.ratio)
    kept = {"unmerged": None, "merged": keep}
    steps = {}
    for name, value in kept.items():
        # A session each: one that merges keeps its caches in another form than one that does not.
        session = backend.start(prompt.embeddings, prompt.visual_positions, merges=value is not None)
        steps[name] = partial(_steps, session, request(point, config.mask_token_id, value))
    timings = time_in_turns(steps, repeats * (CACHED_REPEATS if backend.kv_cache else 1))
    work = Workload(sizes.text_tokens + point.visual_tokens, point.visual_tokens, point.answer_tokens)
    cost = uncached_step if loop == "uncached" else cached_step
    flops = {name: cost(config, work, sizes.merge.layer, value).flops for name, value in kept.items()}
    ratios = [plain.total / merged.total for plain, merged in zip(timings["unmerged"], timings["merged"], strict=True)]
    ideal = flops["unmerged"] / flops["merged"]
    row: dict[str, Any] = {
        "loop": loop,
        "factor": point.factor,
        "value": point.value,
        "visual_tokens": point.visual_tokens,
        "answer_tokens": point.answer_tokens,
        "layers": point.layers,
        "keep": keep,
        "ratio": spread(ratios, 4),
        "flop_ideal": round(ideal, 4),
        "of_flop_ideal": round(statistics.median(ratios) / ideal, 4),
    }
    for name, runs in timings.items():
        seconds = [run.total for run in runs]
        row[name] = {
            "step_seconds": spread(seconds),
            "flops": flops[name],
            "gflop_per_second": round(flops[name] / statistics.median(seconds) / 1e9, 1),
        }
    return row


BundleOf = Callable[[Proportions, int], AbstractContextManager[Bundle]]


@contextmanager
def random_bundle(sizes: Proportions, layers: int) -> Iterator[Bundle]:
    """A bundle of ``layers`` layers with random weights, for both loops, gone afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        config = dict(sizes.config) | {"n_layers": layers}
        yield load_bundle(build(Path(scratch), sizes.merge, GenerationConfig(8), LOOPS, config))


def run(
    sizes: Proportions,
    sweep: Sweep,
    repeats: int,
    bundle_of: BundleOf = random_bundle,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure every point in every loop; points of one depth share a bundle."""
    start = time.perf_counter()
    points = sweep.points(sizes)
    found: dict[tuple[Loop, Point], dict[str, Any]] = {}
    for layers in sorted({point.layers for point in points}):
        with bundle_of(sizes, layers) as bundle:
            for loop in LOOPS:
                backend = OnnxRuntimeBackend(bundle, loop, device="cpu")
                for point in points:
                    if point.layers == layers:
                        progress("measuring", len(found), len(points) * len(LOOPS))
                        found[loop, point] = measure(backend, bundle, sizes, loop, point, repeats)
    return {
        "machine": machine(),
        "config": dict(sizes.config),
        "text_tokens": sizes.text_tokens,
        "merge_layer": sizes.merge.layer,
        "ratio": sizes.merge.ratio,
        "weights": "random",
        "repeats": repeats,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": [found[loop, point] for loop in LOOPS for point in points],
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    heads = ["loop", "varied", "K", "unmerged step, ms", "GFLOP/s", "merged step, ms", "GFLOP/s", "ratio"]
    heads += ["FLOP-ideal", "of it"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in found:
        cells = [row["loop"], f"{row['factor']} = {row['value']}", str(row["keep"])]
        for name in ("unmerged", "merged"):
            cells += [f"{1000 * row[name]['step_seconds']['median']:.1f}", f"{row[name]['gflop_per_second']:.0f}"]
        ratio = row["ratio"]
        cells += [f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})", f"{row['flop_ideal']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {row['of_flop_ideal']:.0%} |")
    return "\n".join(lines)


@click.command()
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help=f"Steps of each kind at each point; with a KV cache {CACHED_REPEATS} times as many.",
)
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that all of it runs, not how fast.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result as JSON.")
def main(repeats: int, quick: bool, json_file: Path | None) -> None:
    """Measure and print a Markdown table."""

    def progress(what: str, done: int, total: int) -> None:
        click.echo(f"{what}: {done} of {total}", err=True)

    sizes = SMALL if quick else LAVIDA
    result = run(sizes, QUICK if quick else Sweep(), repeats, progress=progress)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    config = sizes.config
    click.echo(
        f"Around V = {sizes.visual_tokens}, G = {sizes.generation.gen_length}, {config['n_layers']} layers; width "
        f"{config['d_model']}, {sizes.text_tokens} text tokens, l* = {result['merge_layer']}, ratio "
        f"{result['ratio']:g}, random weights; {repeats} steps each, {repeats * CACHED_REPEATS} with a cache, in "
        f"{result['seconds']:.0f} s with the building of the bundles; {result['machine']['cpu']}, "
        f"{result['machine']['cores']} cores\n"
    )
    click.echo(table(result["rows"]))


if __name__ == "__main__":
    claim()
    main()
