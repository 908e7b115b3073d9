"""What `d3tom-export build` of a checkpoint costs: seconds, peak memory and bytes written, for each known geometry.

    python -m benchmarks.export_cost [--geometry NAME]... [--rounds N] [--json FILE]

The checkpoints are bfloat16 shards of zeros in sparse files, which take no disk; a build does not care, because it
links weights and reads them only to hash them. Each build is a process of its own, as a user starts it; builds take
turns.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.loops import machine
from d3tom_export.checkpoint.geometry import GEOMETRIES
from d3tom_export.cost.bench import spread
from d3tom_export.export.preflight import GIB
from d3tom_export.export.weights import write_geometry

LOOP_OPTIONS = {"uncached": (), "cached": ("--kv-cache",), "both": ("--kv-cache", "both")}


@dataclass(frozen=True)
class Built:
    """One build, as its report and the file system say."""

    seconds: float
    peak_memory: int
    """Bytes."""
    weights: int
    """Bytes of the linked weight files."""
    written: int
    """Bytes of everything else in the bundle."""


def build(checkpoint: Path, loops: str, output: Path) -> Built:
    """Build ``checkpoint`` with linked weights in a process of its own; the bundle is removed again."""
    command = [sys.executable, "-m", "d3tom_export", "build", "--model", str(checkpoint), "--layer", "2"]
    command += ["--ratio", "0.9", *LOOP_OPTIONS[loops], "--self-check", "0", "--output", str(output), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    report = json.loads(done.stdout)
    files = [path.stat() for path in output.rglob("*") if path.is_file()]
    linked = sum(file.st_size for file in files if file.st_nlink > 1)
    shutil.rmtree(output)
    return Built(report["seconds"], report["peak_memory_bytes"], linked, sum(file.st_size for file in files) - linked)


def run(geometries: Sequence[str], rounds: int, scratch: Path) -> list[dict[str, Any]]:
    """A row for each geometry and choice of loops."""
    built: dict[tuple[str, str], list[Built]] = {
        (geometry, loops): [] for geometry in geometries for loops in LOOP_OPTIONS
    }
    for geometry in geometries:
        (scratch / geometry).mkdir()
        write_geometry(scratch / geometry, geometry, "sparse")
    for number in range(rounds):
        for (geometry, loops), results in built.items():
            click.echo(f"{geometry}, {loops}: round {number + 1} of {rounds}", err=True)
            results.append(build(scratch / geometry, loops, scratch / "bundle"))
    return [
        {
            "geometry": geometry,
            "loops": loops,
            "seconds": spread([one.seconds for one in results]),
            "peak_memory_bytes": max(one.peak_memory for one in results),
            "weights_bytes": results[0].weights,
            "written_bytes": results[0].written,
            "written_share": results[0].written / results[0].weights,
        }
        for (geometry, loops), results in built.items()
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| geometry | loops | seconds | peak memory | linked weights | written beside them |", "| --- " * 6 + "|"]
    for row in found:
        seconds = row["seconds"]
        cells = [row["geometry"], row["loops"], f"{seconds['median']:.0f} ({seconds['min']:.0f}-{seconds['max']:.0f})"]
        cells += [f"{row['peak_memory_bytes'] / GIB:.2f} GiB", f"{row['weights_bytes'] / 1e9:.2f} GB"]
        lines.append(f"| {' | '.join(cells)} | {row['written_bytes'] / 1e6:.2f} MB ({row['written_share']:.3%}) |")
    return "\n".join(lines)


@click.command()
@click.option("--geometry", "geometries", multiple=True, type=click.Choice(GEOMETRIES), help="Only these.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Builds of each kind.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result as JSON.")
def main(geometries: tuple[str, ...], rounds: int, json_file: Path | None) -> None:
    """Measure and print a Markdown table."""
    with tempfile.TemporaryDirectory() as scratch:
        found = run(geometries or GEOMETRIES, rounds, Path(scratch))
    if json_file is not None:
        result = {"machine": machine(), "rounds": rounds, "rows": found}
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(table(found))


if __name__ == "__main__":
    main()
