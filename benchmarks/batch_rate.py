"""Questions a second: `batch` over a file of them, in processes and on Ray, against a command of `run` for each.

    python -m benchmarks.batch_rate BUNDLE [--rows 1000] [--runs 20] [--jobs 1 --jobs 2] [--ray] [--json FILE]

The questions are those of the bundle's samples.zip, again and again until there are as many rows; `run` is given the
first ones, evenly spread. Every command is a process of its own, started, opened and loaded: its whole time counts, and
`batch` is given beside it without its start. Answers of all ways are compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from d3tom_export.prompt.samples import INDEX, SAMPLES_FILE


def lay_out(bundle: Path, rows: int, folder: Path) -> list[dict[str, Any]]:
    """A folder of ``rows`` questions and their pictures, from the bundle's samples; its lines."""
    with zipfile.ZipFile(bundle / SAMPLES_FILE) as archive:
        archive.extractall(folder)
    index = folder / INDEX
    samples = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines() if line.strip()]
    index.unlink()
    lines = [
        {"id": at, "image": each["image"], "question": each["prompt"]}
        for at, each in ((at, samples[at % len(samples)]) for at in range(rows))
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return lines


def _timed(*arguments: object) -> tuple[float, dict[str, Any]]:
    """Seconds of a command, and what its ``--json -`` says."""
    command = [sys.executable, "-m", "d3tom_export", *map(str, arguments), "--json", "-"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    return time.perf_counter() - started, dict(json.loads(done.stdout))


def measure(
    bundle: Path, rows: int, runs: int, jobs: Sequence[int], on_ray: bool, more: Sequence[str], scratch: Path
) -> list[dict[str, Any]]:
    """A row for the loop over `run`, and for each `batch`."""
    data = scratch / "data"
    lines = lay_out(bundle, rows, data)
    picked = [lines[at * rows // runs] for at in range(runs)]
    seconds, alone = 0.0, {}
    for line in picked:
        took, told = _timed("run", bundle, "--image", data / line["image"], "--prompt", line["question"], *more)
        seconds += took
        alone[line["id"]] = told["text"]
    click.echo(f"run: {runs} commands in {seconds:.1f} s", err=True)
    found = [{"way": "a `run` for each", "rows": runs, "seconds": seconds, "asking": None}]
    ways = [(f"`batch --jobs {count}`", ["--jobs", count]) for count in jobs]
    ways += [(f"`batch --ray local --jobs {count}`", ["--ray", "local", "--jobs", count]) for count in jobs if on_ray]
    for way, given in ways:
        output = scratch / "answers.jsonl"
        output.unlink(missing_ok=True)
        took, told = _timed("batch", bundle, "--input", data, "--output", output, *given, *more)
        texts = [json.loads(line)["text"] for line in output.read_bytes().splitlines()]
        if len(texts) != rows or any(texts[at] != text for at, text in alone.items()):
            raise click.ClickException(f"{way} answered otherwise than `run`.")
        found.append({"way": way, "rows": rows, "seconds": took, "asking": told["seconds"]})
        click.echo(f"{way}: {took:.1f} s", err=True)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| way | questions | seconds | a second | a second, its start apart |", "| --- " * 5 + "|"]
    for row in found:
        apart = f"{row['rows'] / row['asking']:.2f}" if row["asking"] else ""
        rate = row["rows"] / row["seconds"]
        lines.append(f"| {row['way']} | {row['rows']:,} | {row['seconds']:.1f} | {rate:.2f} | {apart} |")
    return "\n".join(lines)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rows", type=click.IntRange(min=1), default=1000, show_default=True, help="Questions of a batch.")
@click.option("--runs", type=click.IntRange(min=1), default=20, show_default=True, help="Commands of `run`.")
@click.option("--jobs", type=click.IntRange(min=1), multiple=True, default=(1, 2), show_default=True)
@click.option("--ray", "on_ray", is_flag=True, help="On a Ray cluster of this machine, too.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result as JSON.")
@click.argument("more", nargs=-1)
def main(
    bundle: Path, rows: int, runs: int, jobs: tuple[int, ...], on_ray: bool, json_file: Path | None, more: tuple[str]
) -> None:
    """Measure and print a Markdown table. MORE, behind --, are options of every command."""
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(bundle, rows, min(runs, rows), jobs, on_ray, more, Path(scratch))
    if json_file is not None:
        from benchmarks.loops import machine

        result = {"machine": machine(), "bundle": str(bundle), "options": more, "rows": found}
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(table(found))


if __name__ == "__main__":
    main()
