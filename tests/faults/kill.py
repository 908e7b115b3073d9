"""``python -m tests.faults.kill``: kills ``build`` and ``build --bundle B --engine tensorrt-rtx`` at random moments.

Each run is a process group of its own, forked from one that has imported torch and built once, so that moments fall
into the work and not into imports; it gets ``SIGKILL`` at a moment that is uniform over the time that a whole run
took. After each kill: the checkpoint is untouched, the output is a whole bundle or not there (with ``--force``: the
former bundle or the new one), nothing half written looks whole; and the next build succeeds and leaves nothing beside
its output. The figures go to standard output as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from d3tom_export.bundle.folder import load_bundle
from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.bundled import bundled_model
from d3tom_export.cli.main import main as command_line
from d3tom_export.engines.record import built_engines, check_plan
from d3tom_export.engines.stages import engine_stages
from d3tom_export.export import assemble
from d3tom_export.stages.contract import StageSpec
from tests.conftest import raw_config, write_checkpoint

ENGINES = (
    "--engine",
    "tensorrt-rtx",
    "--sm",
    "89",
    "--precision",
    "fp16",
    "--merge-op",
    "onnx",
    "--visual-tokens",
    "1:9:60",
)


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 by name of every file, and of the target of every link."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _fork(arguments: Sequence[str], log: Path) -> int:
    """``d3tom-export`` with ``arguments`` as a process group of its own."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        command_line(list(arguments), prog_name="d3tom-export")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: Sequence[str], log: Path) -> float:
    """A whole run that must succeed; its seconds."""
    started = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(_fork(arguments, log), 0)[1])
    if status:
        raise AssertionError(f"d3tom-export {' '.join(arguments)} ended with {status}:\n{log.read_text()}")
    return time.monotonic() - started


def _kill(arguments: Sequence[str], log: Path, after: float) -> bool:
    """Whether the run was killed, and did not end before."""
    process = _fork(arguments, log)
    time.sleep(after)
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:  # not yet a group of its own
        os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def _replay_exports() -> None:
    """From now on every stage is exported once; later builds write what the first one did, in the pieces that a file
    is written in. torch's exporter takes nine tenths of a build's time and touches no file of it."""
    export, recorded = assemble.export_stage, {}

    def replay(spec: StageSpec, module: Any, path: Path, places: Any) -> list[str]:
        if path.name not in recorded:
            weights = export(spec, module, path, places)
            recorded[path.name] = (path.read_bytes(), weights)
        else:
            time.sleep(0.05)
            content, weights = recorded[path.name]
            with path.open("xb", buffering=0) as file:
                for start in range(0, len(content), 4096):
                    file.write(content[start : start + 4096])
        return weights

    assemble.export_stage = replay


def kill_builds(checkpoint: Path, room: Path, kills: int, seed: int, more: Sequence[str]) -> Counter[str]:
    """Half of the kills are of builds of a new output, half of ``--force`` over a bundle."""
    chance, seen = random.Random(seed), Counter[str]()
    place, log = room / "place", room / "log"
    place.mkdir()
    output = place / "out"
    arguments = ["build", "--model", str(checkpoint), "--output", str(output), "--layer", "1", "--ratio", "0.7", *more]
    untouched = _hashes(checkpoint)
    _run(arguments, log)  # warms what is forked afterwards: files in memory
    shutil.rmtree(output)
    seconds = _run(arguments, log)
    number = -1
    while seen["killed"] < kills:
        number += 1
        force = number % 2 == 1
        if not force:
            shutil.rmtree(output, ignore_errors=True)
        before = _hashes(output) if force else {}
        seen["killed" if _kill([*arguments, "--force"], log, chance.uniform(0, seconds)) else "ended before"] += 1
        assert _hashes(checkpoint) == untouched, "the checkpoint was changed"
        if os.path.lexists(output):
            load_bundle(output)
            seen["former bundle whole" if force and _hashes(output) == before else "new bundle whole"] += 1
        else:
            assert not force, "the former bundle is gone"
            seen["no output"] += 1
        left = [path for path in place.iterdir() if path != output]
        seen["left something"] += bool(left)
        assert all(path.name.startswith(".out.partial-") for path in left), left
        _run([*arguments, "--force"], log)
        seen["swept"] += "a killed build had left it" in log.read_text()
        assert [path.name for path in place.iterdir()] == ["out"], list(place.iterdir())
        load_bundle(output)
        assert _hashes(checkpoint) == untouched, "the checkpoint was changed"
        print(number + 1, dict(seen), file=sys.stderr, flush=True)
    seen["milliseconds of a run"] = round(1000 * seconds)
    return seen


def kill_engine_builds(checkpoint: Path, room: Path, kills: int, seed: int, more: Sequence[str]) -> Counter[str]:
    """Every second kill is of a build over engines that do not fit any more."""
    chance, seen = random.Random(seed), Counter[str]()
    kept, folder, log = room / "kept", room / "bundle", room / "log"
    _run(["build", "--model", str(checkpoint), "--output", str(kept), "--layer", "1", "--ratio", "0.7", *more], log)
    arguments = ["build", "--bundle", str(folder), *ENGINES]

    shutil.copytree(kept, folder)
    seconds = _run(arguments, log)
    with_engines = Path(shutil.copytree(folder, room / "with_engines"))
    bundle = load_bundle(kept)
    stages = set(engine_stages(bundle.manifest.stages, bundle.config, bundle.manifest.merge))
    number = -1
    while seen["killed"] < kills:
        number += 1
        over = number % 2 == 1
        shutil.rmtree(folder)
        shutil.copytree(with_engines if over else kept, folder)
        wanted = [*arguments, *(["--visual-tokens", "1:20:90"] if over else [])]
        seen["killed" if _kill(wanted, log, chance.uniform(0, seconds)) else "ended before"] += 1
        load_bundle(folder)  # and so it runs
        for target, records in built_engines(folder).items():
            for record in records.values():
                check_plan(folder / target.folder, record)
            assert not over or set(records) == stages, "engines that were there are gone"
        seen["left something"] += any("partial" in path.name for path in folder.rglob("*"))
        _run(wanted, log)
        seen["engines taken over"] += log.read_text().count("keeping ")
        files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert found == {*files, MANIFEST_FILE}, found ^ {*files, MANIFEST_FILE}
        assert not any("partial" in name for name in found), found
        (records,) = built_engines(folder).values()
        assert set(records) == stages
        load_bundle(folder)
        print(number + 1, dict(seen), file=sys.stderr, flush=True)
    seen["milliseconds of a run"] = round(1000 * seconds)
    return seen


KINDS: dict[str, Callable[[Path, Path, int, int, Sequence[str]], Counter[str]]] = {
    "build": kill_builds,
    "engines": kill_engine_builds,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="build, engines; default: both")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundled", action="store_true", help="the bundled model, not a smaller synthetic one")
    parser.add_argument("--replay", action="store_true", help="run torch's exporter once, and write what it wrote then")
    parser.add_argument("--room", type=Path, required=True, help="a folder to work in, which must not exist")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    options.room.mkdir(parents=True)
    if options.bundled:
        checkpoint = Path(shutil.copytree(bundled_model(), options.room / "checkpoint"))
        more: tuple[str, ...] = ("--self-check", "0", "--weights", "link")
    else:
        no_eyes = {"mm_vision_tower": None, "vision_config": None}
        checkpoint = write_checkpoint(options.room / "checkpoint", raw_config(n_layers=3, **no_eyes))
        more = ("--self-check", "0", "--gen-length", "8")
    if options.replay:
        _replay_exports()
    warm = ["build", "--model", str(checkpoint), "--output", str(options.room / "warm"), "--layer", "1", *more]
    command_line([*warm, "--ratio", "0.7"], prog_name="d3tom-export", standalone_mode=False)
    for kind in options.kinds or KINDS:
        room = options.room / kind
        room.mkdir()
        started = time.monotonic()
        seen = KINDS[kind](checkpoint, room, options.kills, options.seed, more)
        print(
            json.dumps(
                {"what": kind, "seed": options.seed, **seen, "minutes": round((time.monotonic() - started) / 60, 1)}
            )
        )


if __name__ == "__main__":
    main()
