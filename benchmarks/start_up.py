"""From the start of `run` to its first step: a bundle that this machine has not seen, and one that it has.

    python -m benchmarks.start_up [--geometry NAME] [--rounds N] [--only-open] [--json FILE]

The bundle has weights of zeros in sparse files, which take no disk and are hashed and loaded like others that lie in
the page cache. Every start is a process of its own: Python and its imports, opening the bundle, loading the stages on
ONNX Runtime, the first step of an answer about a picture of 100 visual tokens. Kinds of starts take turns. The user's
cache folder is left alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from d3tom_export.checkpoint.geometry import GEOMETRIES
from d3tom_export.cost.bench import spread

STARTS = {
    "every file hashed": ("full", True),
    "first opening": ("auto", True),
    "later opening": ("auto", True),
    "first opening, for engines": ("auto", False),
    "later opening, for engines": ("auto", False),
}
"""How the bundle is opened: ``--verify``, and whether weights are read."""

PARTS = ("start", "open", "load", "step")


def start(folder: Path, verify: str, reads_weights: bool, only_open: bool, began: float) -> dict[str, float]:
    """Seconds of one start's parts, in this process, which was started at ``began`` (``time.time``)."""
    from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
    from d3tom_export.bundle.folder import load_bundle
    from d3tom_export.cost.bench import random_prompt
    from d3tom_export.pipeline import run_loop

    marks = [time.time()]
    bundle = load_bundle(folder, verify, reads_weights=reads_weights)  # type: ignore[arg-type]
    marks.append(time.time())
    if not only_open and reads_weights:
        manifest, language = bundle.manifest, bundle.config.language
        loop = manifest.loops[0]
        backend = OnnxRuntimeBackend(bundle, loop, device="cpu")
        marks.append(time.time())
        prompt = random_prompt(language, 30, 100)
        generation = replace(manifest.generation, gen_length=32, block_length=32)
        next(run_loop(backend, prompt, language.mask_token_id, generation, manifest.merge))
        marks.append(time.time())
    return dict(
        zip(PARTS, (after - before for before, after in zip([began, *marks], marks, strict=False)), strict=False)
    )


def _started(folder: Path, cache: Path, name: str, only_open: bool) -> dict[str, float]:
    verify, reads_weights = STARTS[name]
    if name.startswith("first"):
        shutil.rmtree(cache, ignore_errors=True)
    call = [str(folder), verify, int(reads_weights), int(only_open), time.time()]
    code = "import json, sys; from pathlib import Path; from benchmarks.start_up import start; "
    code += "a = json.loads(sys.argv[1]); print(json.dumps(start(Path(a[0]), *a[1:])))"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(call)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise click.ClickException(f"A start ({name}) failed: {done.stderr[-500:]}")
    return dict(json.loads(done.stdout))


def _build(geometry: str, output: Path, cache: Path) -> None:
    command = [sys.executable, "-m", "d3tom_export", "build", "--geometry", geometry, "--weights", "sparse"]
    command += ["--layer", "2", "--ratio", "0.9", "--self-check", "0", "--output", str(output)]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed: {done.stderr[-500:]}")


def run(geometry: str, rounds: int, only_open: bool, scratch: Path) -> list[dict[str, Any]]:
    """A row for the first start after the build, and for each kind of start."""
    bundle, cache = scratch / "bundle", scratch / "cache"
    _build(geometry, bundle, cache)
    found = {"later opening, the first after the build": [_started(bundle, cache, "later opening", only_open)]}
    found |= {name: [] for name in STARTS}
    for number in range(rounds):
        for name in STARTS:  # in this order: those that come later open what the ones before have seen
            click.echo(f"{name}: round {number + 1} of {rounds}", err=True)
            found[name].append(_started(bundle, cache, name, only_open))
    return [
        {"start": name, "seconds": {part: spread([one[part] for one in all_]) for part in PARTS if part in all_[0]}}
        | {"total": spread([sum(one.values()) for one in all_])}
        for name, all_ in found.items()
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown, in seconds."""
    lines = ["| start | Python and imports | opening | loading stages | first step | together |", "| --- " * 6 + "|"]
    for row in found:
        cells = [row["start"]]
        for part in PARTS:
            seconds = row["seconds"].get(part)
            cells.append(f"{seconds['median']:.2f}" if seconds else "")
        total = row["total"]
        lines.append(f"| {' | '.join(cells)} | {total['median']:.1f} ({total['min']:.1f}-{total['max']:.1f}) |")
    return "\n".join(lines)


@click.command()
@click.option("--geometry", type=click.Choice(GEOMETRIES), default="lavida-2b", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Starts of each kind.")
@click.option("--only-open", is_flag=True, help="Load no stage: opening alone takes little memory.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result as JSON.")
def main(geometry: str, rounds: int, only_open: bool, json_file: Path | None) -> None:
    """Measure and print a Markdown table."""
    with tempfile.TemporaryDirectory() as scratch:
        found = run(geometry, rounds, only_open, Path(scratch))
    if json_file is not None:
        from benchmarks.loops import machine  # with torch: no start of `run` imports it

        result = {"machine": machine(), "geometry": geometry, "rounds": rounds, "rows": found}
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(table(found))


if __name__ == "__main__":
    main()
