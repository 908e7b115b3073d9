"""Answers in few steps on the bundled model: every loop, merging and commit rule against the release's loop.

    python -m benchmarks.decoding BUNDLE [--samples N] [--commit RULE] [--figure FILE] [--json FILE]

BUNDLE is one of the bundled model for both loops, `d3tom-export build --layer 2 --ratio 0.9 --kv-cache both --merge-at
prefill`. Every contestant answers the same held-out scenes, in turns; ratios are to the release-style loop without a
cache, unmerged, under its plan, within a scene. Times are from the prompt's embeddings on: the pictures' encoding is
the same for all. The release's answers have all their steps, ours end where their text is settled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.contestants import CONTESTANTS
from benchmarks.loops import machine
from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.bundle.folder import load_bundle
from d3tom_export.cli.bench_report import table
from d3tom_export.config import LOOPS, CommitRule, GenerationConfig
from d3tom_export.cost.bench import Answerer, Question, answer_in_turns, on_backend, summarize
from d3tom_export.cost.combinations import Combination, combinations_of
from d3tom_export.cost.pareto_figure import draw_front
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.pipeline import Reader, embed_sample
from d3tom_export.process import claim
from d3tom_export.prompt.samples import SAMPLES_FILE, Sample, load_samples

RULES: tuple[CommitRule, ...] = ("threshold", "factor", "frechet")


def questions_of(
    samples: Sequence[Sample], reader: Reader, backend: OnnxRuntimeBackend, plan: GenerationConfig
) -> list:
    """The ``samples`` as prompts with their right answers."""

    def question(sample: Sample) -> Question:
        def right(record: StepRecord, generation: GenerationConfig) -> bool:
            return reader.answer(record, generation).text == sample.answer

        return Question(embed_sample(backend, sample, reader, plan), right)

    return [question(sample) for sample in samples]


@click.command()
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(exists=True, path_type=Path))
@click.option("--samples", type=click.IntRange(min=1), default=256, show_default=True, help="Held-out scenes.")
@click.option("--commit", "rules", type=click.Choice(RULES), multiple=True, help="Commit rules.  [default: threshold]")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw right answers against time.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result as JSON.")
def main(
    bundle_folder: Path, samples: int, rules: tuple[CommitRule, ...], figure: Path | None, json_file: Path | None
) -> None:
    """Measure and print a table."""
    bundle = load_bundle(bundle_folder)
    manifest, reader = bundle.manifest, Reader.of_bundle(bundle)
    released = replace(manifest.generation, end_ids=reader.end_ids)
    plan = replace(released, early_exit=True)
    chosen: tuple[CommitRule, ...] = rules or ("threshold",)
    settings = {rule: plan.changed(commit=rule) for rule in chosen}
    backends = {loop: OnnxRuntimeBackend(bundle, loop, device="cpu") for loop in LOOPS}
    mask = bundle.config.language.mask_token_id
    (release,) = (contestant for contestant in CONTESTANTS if contestant.name == "release")

    def as_released(loop: str) -> Answerer:
        answer = release.open(bundle, loop)  # type: ignore[arg-type]
        return lambda prompt, _, merge: answer(prompt, released, merge)

    answerers: dict[Combination, Answerer] = {
        replace(each, by="release"): as_released(each.loop) for each in combinations_of(LOOPS)
    }
    answerers |= {
        each: on_backend(backends[each.loop], mask)
        for each in combinations_of(LOOPS, at_prefill=manifest.merge.merge_at == "prefill", rules=chosen)
    }
    scenes = load_samples(bundle.folder / SAMPLES_FILE, samples)
    questions = questions_of(scenes, reader, backends["uncached"], plan)

    def progress(what: str, done: int, total: int) -> None:
        if not done % 16:
            click.echo(f"{what}: {done} of {total}", err=True)

    answers = answer_in_turns(answerers, questions, plan, settings, manifest.merge, 1, progress)
    rows = summarize(answers, {}, bundle.config.language, manifest.merge.layer)
    work = next(iter(answers.values()))[0].work
    result = {
        "bundle": manifest.model_name,
        "backend": "onnxruntime, and the release's loop in eager PyTorch",
        "precision": "fp32",
        "weights": sorted(manifest.formats),
        "quantization": None,
        "prompt": f"{len(questions)} held-out scenes, the first",
        "prompt_tokens": work.prompt_tokens,
        "visual_tokens": work.visual_tokens,
        "answer_tokens": work.answer_tokens,
        "batch": 1,
        "rounds": 1,
        "merge": manifest.merge.to_json(),
        "rules": {rule: {**each.to_json(), "words": rule} for rule, each in settings.items()},
        "machine": machine(),
        "rows": rows,
    }
    if figure is not None:
        draw_front(figure, f"{manifest.model_name}, {len(questions)} held-out scenes", rows)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(f"{result['machine']['cpu']}, {result['machine']['cores']} cores\n\n{table(result)}")


if __name__ == "__main__":
    claim()
    main()
