"""What sampling costs beside greedy decoding at LaViDa's vocabulary, 126,464 tokens: whole steps, and the host's part.

    python -m benchmarks.sampling [--answer-tokens G] [--rounds N] [--json FILE]

Whole steps are those of an uncached model of few, narrow layers on ONNX Runtime's CPU kernels: a real model's layers
take longer, so the ratios to a greedy step are upper bounds. The host's part is what happens between two steps of a
backend: from its results to the tokens that are committed.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.loops import machine
from benchmarks.proportions import LAVIDA, SMALL, Proportions, build
from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.bundle.folder import load_bundle
from d3tom_export.config import GenerationConfig
from d3tom_export.cost.bench import random_prompt, spread, time_in_turns
from d3tom_export.loop.backend import Prompt
from d3tom_export.loop.denoise import Session, StepRequest, StepResult
from d3tom_export.pipeline import run_loop
from d3tom_export.process import claim

KINDS: Mapping[str, dict[str, Any]] = {
    "greedy": {},
    "random": {"remasking": "random"},
    "margin": {"remasking": "margin"},
    "entropy": {"remasking": "entropy"},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 1": {"temperature": 1.0},
}


@dataclass
class _Watched:
    """A backend that notes how long its steps take: the rest of a loop's time is the host's."""

    backend: OnnxRuntimeBackend
    inside: float = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def start(self, *arguments: Any, **more: Any) -> Session:
        session, watched = self.backend.start(*arguments, **more), self

        class Timed:
            first_token = session.first_token

            def step(self, request: StepRequest) -> StepResult:
                began = time.perf_counter()
                try:
                    return session.step(request)
                finally:
                    watched.inside += time.perf_counter() - began

        return Timed()


def run(sizes: Proportions, rounds: int, scratch: Path) -> list[dict[str, Any]]:
    """One row a kind of sampling; kinds take turns."""
    claim()
    bundle = load_bundle(build(scratch / "bundle", sizes.merge, sizes.generation, ("uncached",), sizes.config))
    language = bundle.config.language
    watched = _Watched(OnnxRuntimeBackend(bundle, device="cpu"))
    prompt: Prompt = random_prompt(language, sizes.text_tokens, sizes.visual_tokens)
    inside: dict[str, list[float]] = {name: [] for name in KINDS}

    def answer(name: str) -> Any:
        watched.inside = 0.0
        generation = replace(sizes.generation, **KINDS[name])
        yield from run_loop(watched, prompt, language.mask_token_id, generation, sizes.merge)  # type: ignore[arg-type]
        inside[name].append(watched.inside)

    timings = time_in_turns({name: partial(answer, name) for name in KINDS}, rounds)
    steps = sizes.generation.steps_per_block
    found = []
    for name, runs in timings.items():
        totals, within = [each.total for each in runs], inside[name][-rounds:]
        host = [(total - part) / steps for total, part in zip(totals, within, strict=True)]
        ratios = [mine.total / greedy.total for mine, greedy in zip(runs, timings["greedy"], strict=True)]
        step = spread([total / steps for total in totals])
        found.append({"kind": name, "step_seconds": step, "host_seconds": spread(host), "ratio": spread(ratios, 3)})
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| sampling | step, ms | host's part, ms | step, to greedy |", "| --- " * 4 + "|"]
    for row in found:
        step, host, ratio = row["step_seconds"], row["host_seconds"], row["ratio"]
        lines.append(
            f"| {row['kind']} | {1e3 * step['median']:.0f} | {1e3 * host['median']:.2f} | "
            f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}) |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--answer-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="G.")
@click.option("--layers", type=click.IntRange(min=3), default=4, show_default=True, help="Of the model.")
@click.option("--vocabulary", type=click.IntRange(min=64), default=126_464, show_default=True, help="Its tokens.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Answers of each kind.")
@click.option("--quick", is_flag=True, help="Sizes at which no time means anything.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result as JSON.")
def main(answer_tokens: int, layers: int, vocabulary: int, rounds: int, quick: bool, json_file: Path | None) -> None:
    """Measure and print a Markdown table."""
    sizes = SMALL if quick else LAVIDA
    if not quick:
        config = dict(sizes.config) | {"n_layers": layers, "vocab_size": vocabulary, "embedding_size": vocabulary}
        config |= {"mask_token_id": vocabulary - 1, "eos_token_id": vocabulary - 2}
        generation = GenerationConfig(answer_tokens, step_ratio=8 / answer_tokens, block_length=answer_tokens)
        sizes = replace(sizes, config=config, visual_tokens=100, text_tokens=30, generation=generation)
    with tempfile.TemporaryDirectory() as scratch:
        found = run(sizes, rounds, Path(scratch))
    if json_file is not None:
        result = {"machine": machine(), "answer_tokens": answer_tokens, "vocabulary": vocabulary, "rows": found}
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(table(found))


if __name__ == "__main__":
    main()
