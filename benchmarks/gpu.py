"""What a borrowed GPU is asked first, in ten minutes: `make gpu`, or `python -m benchmarks.gpu`.

    python -m benchmarks.gpu [--bundle DIR] [--wheels DIR] [--output FILE.json] [--minutes 10] [--only NAME]

Each check names what it needs; one whose needs are not met is left out with the reason, one that fails is told and does
not keep the others from running. Without a GPU it says what it would do. The report is a table in Markdown, for the
docs, and the same as JSON. `make gpu-parcel` packs, where there is a network, what such a machine lacks: the bundle and
wheels, in parts of at most 60 MB.

Every check is a test, too: `python -m pytest -m gpu tests/test_gpu_checks.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_PARTS = ".part-"
_RESTARTED = "D3TOM_EXPORT_GPU_PACKAGES"


@dataclass
class Outcome:
    """What became of one check."""

    check: str
    state: str
    """passed, failed, left out, or would run."""
    seconds: float = 0.0
    why: str = ""
    """What failed, or what is missing."""
    figures: dict[str, Any] = field(default_factory=dict)


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes in Markdown."""
    lines = ["| check | state | seconds | |", "| --- | --- | --- | --- |"]
    for one in outcomes:
        said = one.why or "; ".join(f"{name} {_short(value)}" for name, value in one.figures.items())
        lines.append(f"| {one.check} | {one.state} | {one.seconds:.1f} | {said} |")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def unpack(wheels: Path, target: Path) -> list[str]:
    """Install the wheels in ``wheels``, whole or in parts, into ``target`` without asking any registry."""
    whole = sorted(wheels.glob("*.whl"))
    for first in sorted(wheels.glob(f"*{_PARTS}aa")):
        joined = target / first.name.removesuffix(f"{_PARTS}aa")
        joined.parent.mkdir(parents=True, exist_ok=True)
        with joined.open("wb") as file:
            for part in sorted(wheels.glob(f"{joined.name}{_PARTS}*")):
                file.write(part.read_bytes())
        whole.append(joined)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    if whole:
        subprocess.run([*pip, *map(str, whole)], check=True)
    return [path.name for path in whole]


def run_checks(bundle: Path | None, minutes: float, only: str | None) -> list[Outcome]:
    """Run what can run here, in order, until ``minutes`` are over."""
    from benchmarks.gpu_checks import CHECKS, Machine

    machine = Machine.of_this_process(bundle)
    outcomes: list[Outcome] = []
    began = time.monotonic()
    for check in CHECKS:
        if only and only not in check.name:
            continue
        outcome = Outcome(check.name, "left out", why=machine.missing(check))
        outcomes.append(outcome)
        if machine.gpu is None:
            outcome.state, outcome.why = "would run", f"{check.what}; needs {', '.join(check.needs)}"
        elif not outcome.why and time.monotonic() - began > 60 * minutes:
            outcome.why = f"the {minutes:g} minutes are over"
        elif not outcome.why:
            print(f"{check.name}: {check.what} ...", file=sys.stderr, flush=True)
            started = time.monotonic()
            try:
                outcome.figures = check.run(machine)
                outcome.state = "passed"
            except Exception as error:  # a fault of one check is its finding
                outcome.state, outcome.why = "failed", f"{type(error).__name__}: {error}"
            outcome.seconds = time.monotonic() - started
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print the table, write the report; 1 where any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="The bundled model's, for both loops; made here if not given.")
    parser.add_argument("--wheels", type=Path, help="What this machine lacks, as `make gpu-parcel` packs it.")
    parser.add_argument("--output", type=Path, help="Where the report goes, as JSON.")
    parser.add_argument("--minutes", type=float, default=10.0, help="After these no further check begins.")
    parser.add_argument("--only", metavar="NAME", help="Run the checks whose name has this in it.")
    options = parser.parse_args(arguments)
    if options.wheels and options.wheels.is_dir() and _RESTARTED not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            unpack(options.wheels, Path(folder))
            paths = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
            again = [sys.executable, "-m", "benchmarks.gpu", *(arguments if arguments is not None else sys.argv[1:])]
            environment = {**os.environ, "PYTHONPATH": paths, _RESTARTED: folder}
            return subprocess.run(again, cwd=ROOT, env=environment, check=False).returncode

    _find_rooms()
    from benchmarks.gpu_checks import Machine

    machine = Machine.of_this_process(options.bundle)
    outcomes = run_checks(options.bundle, options.minutes, options.only)
    print(f"{machine}\n\n{table(outcomes)}")
    if options.output:
        report = {"machine": machine.to_json(), "checks": [asdict(one) for one in outcomes]}
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(one.state == "failed" for one in outcomes))


def _find_rooms() -> None:
    """Let `d3tom_export.plugins` and `d3tom_export.cli` be found where the package is not installed."""
    import d3tom_export

    if str(ROOT) not in d3tom_export.__path__:
        d3tom_export.__path__.append(str(ROOT))


if __name__ == "__main__":
    sys.exit(main())
