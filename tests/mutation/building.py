"""Faults that a build makes: its own self-check must see them, and the manifest say that it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from click.testing import CliRunner

from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.cli.main import main
from d3tom_export.export import assemble
from tests.mutation import selection, surroundings
from tests.mutation.fault import Fault, Outcome, Subjects, digests, sign
from tests.mutation.layers import without_norm
from tests.mutation.place import in_graphs


@dataclass(frozen=True)
class BuildFault(Fault):
    """What a faulty export would have written; ``build`` goes on from there."""

    def run(self, subjects: Subjects, scratch: Path) -> Outcome:
        return build_of(subjects, scratch, self)


def build_of(subjects: Subjects, scratch: Path, fault: Fault | None) -> Outcome:
    """``build`` of the synthetic checkpoint, whose export is a copy of its bundle, with or without a fault."""

    def write_stages(checkpoint: Any, request: Any, generation: Any, folder: Path, **rest: Any) -> Bundle:
        shutil.copytree(subjects.small, folder, dirs_exist_ok=True)
        if fault is not None:
            before = digests(folder)
            fault.apply(folder)
            sign(folder)
            assert digests(folder) != before, f"{fault.id}: nothing changed"
        return load_bundle(folder)

    output = scratch / "built"
    arguments = ["build", "--model", str(subjects.checkpoint), "--layer", "1", "--ratio", "0.7", "--kv-cache", "both"]
    with patch.object(assemble, "write_stages", write_stages):
        result = CliRunner().invoke(main, [*arguments, "--output", str(output)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert (output / "manifest.json").is_file(), result.output
    report = json.loads((output / "manifest.json").read_text())["validation"]
    assert report["passed"] == (result.exit_code == 0), result.output
    problems: Sequence[str] = report["problems"] or [f"max_abs_logit_error {report['max_abs_logit_error']}"]
    return Outcome(None if report["passed"] else "parity", problems[0])


def _of_build(faults: list[Fault]) -> list[Fault]:
    return [BuildFault(fault.name, "build", f"build, {fault.place}", fault.apply) for fault in faults]


FAULTS: list[Fault] = [
    *_of_build(in_graphs("others dropped in the place of merged", "merge", selection.others_dropped)),
    *_of_build(in_graphs("final norm dropped", "cached_back", without_norm("ln_f.weight"))),
    *_of_build(in_graphs("output token one up", "back", surroundings.token_one_up, graphs=("standard",))),
]
