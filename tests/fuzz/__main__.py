"""``python -m tests.fuzz [--seconds N] [TARGET ...]``: fuzz the readers of strangers' files, N seconds each.

With atheris (``pip install -e ".[fuzz]"``) libFuzzer looks for inputs that reach new lines of ours; without, bytes are
drawn at random, from a seed that is printed. A finding stops with the input's bytes and its trace, and exit code 1.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_LONGEST = 64
"""Bytes of an input: what a dozen edits need."""

_AT_A_TIME = min(2, os.cpu_count() or 1)
"""Targets, each of which keeps a core busy."""


def _make_subjects(folder: Path, names: Sequence[str]) -> None:
    """What targets work on copies of, once for all of them: making it imports torch and its exporter."""
    from d3tom_export.checkpoint.folder import open_checkpoint
    from d3tom_export.config import GenerationConfig, MergeConfig
    from d3tom_export.export import assemble
    from d3tom_export.export.request import StageRequest
    from tests.conftest import raw_config, write_checkpoint
    from tests.traces import Traces, kept_folder

    checkpoint, bundle = write_checkpoint(folder / "checkpoint", raw_config()), folder / "bundle"
    if "manifest" in names:
        bundle.mkdir()
        request = StageRequest(MergeConfig(layer=1, ratio=0.7))
        assemble.export_stage = Traces(kept_folder()).export_stage
        assemble.write_stages(open_checkpoint(checkpoint), request, GenerationConfig(8), bundle)


def _prepare(name: str, subjects: Path, folder: Path) -> Callable[[bytes], None]:
    """The target, on a scratch folder inside ``folder``; imports the library here, so that it can be instrumented."""
    from .targets import TARGETS, scratch_of

    return TARGETS[name](scratch_of(name, subjects / "checkpoint", subjects / "bundle", folder))


def _fuzz(name: str, seconds: int, seed: int, subjects: Path, folder: Path) -> None:
    """Fuzz one target in this process; libFuzzer ends it."""
    try:
        import atheris
    except ImportError:
        _fuzz_at_random(name, seconds, seed, subjects, folder)
        return
    with atheris.instrument_imports(include=["d3tom_export"]):
        run = _prepare(name, subjects, folder)
    options = [
        f"-seed={seed}",
        f"-max_total_time={seconds}",
        f"-max_len={_LONGEST}",
        "-timeout=30",
        "-rss_limit_mb=4096",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", "-print_final_stats=1"], run)
    atheris.Fuzz()


def _fuzz_at_random(name: str, seconds: int, seed: int, subjects: Path, folder: Path) -> None:
    run = _prepare(name, subjects, folder)
    rng, count, end = random.Random(seed), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = rng.randbytes(rng.randrange(_LONGEST))
        try:
            run(data)
        except BaseException:
            print(f"{name}, seed {seed}, input {count}: {data!r}", flush=True)
            raise
        count += 1
    print(f"{name}: {count} inputs at random (seed {seed}), no finding; with atheris they would be looked for.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help="functions of tests/fuzz/targets.py  [default: all]"
    )
    parser.add_argument("--seconds", type=int, default=20, help="for each target  [default: 20]")
    parser.add_argument("--seed", type=int, help="to begin from, as CI does  [default: a new one each time]")
    parser.add_argument("--in-process", type=Path, metavar="SUBJECTS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        with tempfile.TemporaryDirectory(dir=arguments.in_process) as folder:  # libFuzzer leaves it behind
            _fuzz(arguments.targets[0], arguments.seconds, arguments.seed, arguments.in_process, Path(folder))
        return 0
    from .targets import TARGETS

    names = arguments.targets or list(TARGETS)
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    seed = random.SystemRandom().randrange(1, 2**32) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory(prefix="d3tom-fuzz-") as folder, ThreadPoolExecutor(_AT_A_TIME) as pool:
        _make_subjects(Path(folder), names)
        runs = pool.map(lambda name: _in_its_own_process(name, arguments.seconds, seed, Path(folder)), names)
        failed = sum(not passed for passed in runs)
    print(f"{len(names) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _in_its_own_process(name: str, seconds: int, seed: int, subjects: Path) -> bool:
    """libFuzzer ends its process, and a crash of one target does not keep the others from running."""
    numbers = ["--seconds", str(seconds), "--seed", str(seed)]
    command = [sys.executable, "-m", "tests.fuzz", "--in-process", str(subjects), *numbers, name]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
        print(f"{name}: FAILED (seed {seed})", flush=True)
        return False
    counts = [line.split(":")[-1].strip() for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    print(f"{name}: {counts[0]} inputs, no finding" if counts else done.stdout.strip(), flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
