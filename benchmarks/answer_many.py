"""Answers in batches beside single ones: `Model.answer_many` with several sizes of batch, in turns.

    python -m benchmarks.answer_many BUNDLE [--samples 64] [--batch 1 --batch 4 --batch 8] [--kv-cache] [--json FILE]

The questions are those of the bundle's samples.zip, of various pictures and layouts; those of equal layout run as one
batch. Each size answers four times the largest of them before the next one does, so that all meet the same machine.
Pictures have been seen before the clock starts: the model remembers what its tower made of them. Tokens are compared
with those of the first size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

import d3tom_export as d3
from d3tom_export.prompt.samples import SAMPLES_FILE, load_samples


@dataclass
class Row:
    """What answers of one size of batch took."""

    batch: int
    answers: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    """Of all threads."""
    same: int = 0
    """Answers with the tokens of the first size."""


def measure(bundle: Path, samples: int, batches: Sequence[int], *, kv_cache: bool) -> list[Row]:
    """A row for each size. Raises :class:`D3tomError` where a question cannot be answered."""
    rows = [Row(batch) for batch in batches]
    window_size = 4 * max(batches)
    requests = [d3.Request(each.picture, each.question) for each in load_samples(bundle / SAMPLES_FILE, samples)]
    with d3.open(bundle, kv_cache=kv_cache) as model:
        for start in range(0, len(requests), window_size):
            window = requests[start : start + window_size]
            model.answer_many(window, batch=max(batches))
            first: list[tuple[int, ...]] = []
            for row in rows:
                wall, processor = time.perf_counter(), time.process_time()
                found = model.answer_many(window, batch=row.batch)
                row.seconds += time.perf_counter() - wall
                row.processor_seconds += time.process_time() - processor
                tokens = []
                for answer in found:
                    if isinstance(answer, d3.D3tomError):
                        raise answer
                    tokens.append(answer.token_ids)
                first = first or tokens
                row.answers += len(tokens)
                row.same += sum(one == other for one, other in zip(tokens, first, strict=True))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| batch | answers | seconds an answer | of the processor | the same tokens |", "| --- " * 5 + "|"]
    for row in rows:
        each, busy = row.seconds / row.answers, row.processor_seconds / row.answers
        lines.append(f"| {row.batch} | {row.answers} | {each:.3f} | {busy:.3f} | {row.same} |")
    return "\n".join(lines)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True, help="Questions.")
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, default=(1, 4, 8), show_default=True)
@click.option("--kv-cache", is_flag=True, help="Answer with the cached loop.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result as JSON.")
def main(bundle: Path, samples: int, batches: tuple[int, ...], kv_cache: bool, json_file: Path | None) -> None:
    """Measure and print a table."""
    rows = measure(bundle, samples, batches, kv_cache=kv_cache)
    if json_file is not None:
        result = {"bundle": str(bundle), "kv_cache": kv_cache, "rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(table(rows))


if __name__ == "__main__":
    main()
