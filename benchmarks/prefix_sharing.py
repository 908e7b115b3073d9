"""Questions that share their picture's prefill: what a further one costs, and what it changes in the answers.

    python -m benchmarks.prefix_sharing BUNDLE... [--samples N] [--rounds N] [--json FILE]

Each BUNDLE is one of the bundled model, `d3tom-export build --layer 2 --ratio 0.9 --kv-cache --share-prefix`, with
`--merge-at prefill` or without. Seconds are from a prompt's embeddings to where the first step begins, of a further
question about a picture that was asked about before, with sharing and without in turns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import click

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.pipeline import Reader, embed_sample, run_loop
from d3tom_export.process import claim
from d3tom_export.prompt.samples import SAMPLES_FILE, Sample, load_samples

QUESTION = "How many digits do you see?"
"""Asked of every picture before the question that is timed."""


@dataclass(frozen=True)
class Row:
    """One bundle's result."""

    merge_at: str
    prompt_tokens: float
    """P and the shared of them, medians."""
    shared_tokens: float
    milliseconds: float
    """Of the prompt part of a further question, median; without sharing and with."""
    shared_milliseconds: float
    right: int
    """Answers that match exactly, without sharing and with."""
    shared_right: int
    lost: int
    """Answers that match without sharing alone, and with it alone."""
    gained: int
    same: int
    """Answers whose text is the same with sharing and without."""
    samples: int


class _Asker:
    """A bundle that answers samples, with sharing or without."""

    def __init__(self, bundle: Bundle) -> None:
        self.reader = Reader.of_bundle(bundle)
        self.backend = OnnxRuntimeBackend(bundle, "cached", device="cpu")
        self._merge, self._mask = bundle.manifest.merge, bundle.config.language.mask_token_id
        end_ids = self.reader.end_ids
        self._generation = replace(bundle.manifest.generation, end_ids=end_ids, early_exit=True)

    def text(self, sample: Sample, *, shared: bool) -> str:
        """The answer to ``sample``."""
        prompt = embed_sample(self.backend, sample, self.reader, self._generation)
        settings = (self._mask, self._generation, self._merge)
        *_, last = run_loop(self.backend, prompt, *settings, share_prefix=shared)
        return self.reader.answer(last, self._generation).text

    def seconds(self, sample: Sample, *, shared: bool) -> tuple[float, int, int]:
        """Of the prompt part of ``sample``, whose picture was asked about before; P and the shared rows."""
        settings = (self._mask, self._generation, self._merge)
        before = embed_sample(self.backend, replace(sample, question=QUESTION), self.reader, self._generation)
        run_loop(self.backend, before, *settings, share_prefix=shared)
        prompt = embed_sample(self.backend, sample, self.reader, self._generation)
        started = time.perf_counter()
        run_loop(self.backend, prompt, *settings, share_prefix=shared)  # starts the answer, and takes no step
        return time.perf_counter() - started, prompt.embeddings.shape[1], prompt.shared_rows


def measure(bundle: Bundle, samples: Sequence[Sample], rounds: int) -> Row:
    """Answer ``samples`` both ways, and time as many of them as there are ``rounds``."""
    asker = _Asker(bundle)
    timed: dict[bool, list[tuple[float, int, int]]] = {False: [], True: []}
    for number in range(rounds):
        for shared in (False, True) if number % 2 else (True, False):
            timed[shared].append(asker.seconds(samples[number % len(samples)], shared=shared))
    right: dict[bool, list[bool]] = {False: [], True: []}
    same = 0
    for sample in samples:
        texts = {shared: asker.text(sample, shared=shared) for shared in (False, True)}
        same += texts[False] == texts[True]
        for shared, text in texts.items():
            right[shared].append(text == sample.answer)
    before, after = sum(right[False]), sum(right[True])
    both = sum(one and other for one, other in zip(*right.values(), strict=True))
    plain, ours = (median(seconds for seconds, _, _ in timed[shared]) * 1e3 for shared in (False, True))
    rows, shared_rows = (median(run[place] for run in timed[True]) for place in (1, 2))
    merge_at = bundle.manifest.merge.merge_at
    turned = (before - both, after - both, same)
    return Row(merge_at, rows, shared_rows, plain, ours, before, after, *turned, len(samples))


@click.command()
@click.argument("folders", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--samples", type=click.IntRange(min=1), default=256, show_default=True, help="Held-out scenes.")
@click.option("--rounds", type=click.IntRange(min=1), default=41, show_default=True, help="Prompts to time, each way.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(folders: tuple[Path, ...], samples: int, rounds: int, json_file: Path | None) -> None:
    """Measure each BUNDLE and print a Markdown table."""
    click.echo(
        "| merged at | prompt, shared | a further question's prompt, ms | shared, ms | exact match | shared "
        "| lost, gained | same |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for folder in folders:
        bundle = load_bundle(folder)
        row = measure(bundle, load_samples(bundle.folder / SAMPLES_FILE, samples), rounds)
        rows.append(row)
        click.echo(
            f"| {row.merge_at} | {row.prompt_tokens:.0f}, {row.shared_tokens:.0f} | {row.milliseconds:.1f} | "
            f"{row.shared_milliseconds:.1f} | {row.right / row.samples:.1%} | {row.shared_right / row.samples:.1%} | "
            f"{row.lost}, {row.gained} | "
            f"{row.same / row.samples:.1%} |"
        )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    claim()
    main()
