"""A fault, where it is put, and how the product answers: by its own commands, never by a check of this suite."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from click.testing import CliRunner, Result

from d3tom_export.cli.main import main

Kind = Literal["graph", "weights", "config", "manifest", "files", "backend", "build"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Subject = Literal["small", "bundled"]
Catcher = Literal["parity", "opening"]
Oracle = Literal["named", "noted", "own"]

FEWER = ("--samples", "3")
"""Samples for a fault that must be caught: validate takes eight by default, which can only catch more."""


@dataclass(frozen=True)
class Subjects:
    """What faults are put into: folders that nothing writes to."""

    checkpoint: Path
    """The synthetic checkpoint: four layers, grouped queries, two shards."""
    small: Path
    """Its bundle for both loops."""
    make_bundled: Callable[[], Path]
    """Makes what ``bundled`` is; most faults do without."""

    @cached_property
    def bundled(self) -> Path:
        """The bundled model's bundle for both loops, with graphs in int8."""
        return self.make_bundled()


@dataclass(frozen=True)
class Outcome:
    """How the product answered."""

    caught_by: Catcher | None
    """Parity failed, or a command refused before it came to that; None: it passed."""
    figures: str
    """What it said, in one line."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a copy of a bundle whose hashes are mended, so that only what it is made for can see it."""

    name: str
    """What is wrong, in words."""
    kind: Kind
    place: str
    """The graph, tensor or field."""
    apply: Callable[[Path], None]
    """Puts it into a bundle's folder."""
    subject: Subject = "small"
    precision: Precision = "fp32"
    options: tuple[str, ...] = ()
    """Of ``validate``, beside the checkpoint: they leave out the loop and the graphs that have no fault."""
    oracle: Oracle = "named"
    """Which weights the oracle reads: of the checkpoint that ``--model`` names; of the one that the manifest notes; the
    bundle's own, because that one is gone."""
    signed: bool = True
    """Whether the manifest's sizes and hashes are mended after the fault."""
    caught_by: Catcher | None = "parity"
    """Who must catch it; None: either."""
    reason: str | None = None
    """Why it may pass. A fault with a reason that is caught all the same is one too many on the list."""
    by_chance: bool = False
    """Whether a fault with a reason may as well be caught: it turns near-ties, and whose rounding decides those is the
    processor's."""
    missed: str | None = None
    """Why a fault that must be caught is not as yet: its test is a strict expected failure."""
    review: bool = False
    """Whether it stands in the fidelity review's table."""
    slow: bool = False

    @property
    def id(self) -> str:
        return f"{self.place}: {self.name}"

    def run(self, subjects: Subjects, scratch: Path) -> Outcome:
        """Put it into a copy of its subject under ``scratch`` and validate that."""
        folder = scratch / "bundle"
        shutil.copytree(subjects.small if self.subject == "small" else subjects.bundled, folder)
        if self.oracle == "own":
            edit_json(folder / "manifest.json", lambda raw: raw["model"].update(source=None))
        before = digests(folder)
        self.apply(folder)
        if self.signed:
            sign(folder)
        assert digests(folder) != before, f"{self.id}: nothing changed"
        return validate(folder, self.arguments(subjects))

    def answered(self, outcome: Outcome) -> bool:
        """Whether ``outcome`` is the answer that the catalogue asks for."""
        if self.reason is not None:
            return outcome.caught_by is None
        return outcome.caught_by is not None and self.caught_by in (None, outcome.caught_by)

    def arguments(self, subjects: Subjects) -> list[str]:
        """What ``validate`` is called with, beside the bundle."""
        named = ["--model", str(subjects.checkpoint)] if self.subject == "small" and self.oracle == "named" else []
        return [*named, *self.options]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a bundle."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def sign(folder: Path) -> None:
    """Mend the manifest's list of files; all else in it stays as it is, right or wrong."""

    def mend(raw: dict[str, Any]) -> None:
        raw["files"] = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in digests(folder).items()
            if name != "manifest.json"
        }

    edit_json(folder / "manifest.json", mend)


def validate(folder: Path, arguments: list[str]) -> Outcome:
    """``d3tom-export validate`` of ``folder``, in this process."""
    report = folder.parent / "report.json"
    result = CliRunner().invoke(main, ["validate", str(folder), "--json", str(report), *arguments])
    return outcome_of(result, json.loads(report.read_text()) if report.is_file() else None)


def outcome_of(result: Result, report: dict[str, Any] | None) -> Outcome:
    """What a command's end means. Anything but an answer or a refusal is an error of the command, or of this suite."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1), result.output
    if report is None:
        message = result.output.strip().splitlines()[-1]
        assert message.startswith("Error: "), message  # interrupted, say
        return Outcome("opening", message)
    assert report["passed"] == (result.exit_code == 0)
    return Outcome(None if report["passed"] else "parity", figures_of(report))


def figures_of(report: dict[str, Any]) -> str:
    """A report's first problem, or else its figures."""
    if not report["passed"] and report.get("problems"):
        return str(report["problems"][0])
    names = ("max_abs_logit_error", "max_relative_logit_error", "token_agreement", "kept_identical")
    return ", ".join(f"{name} {report[name]}" for name in names if name in report)
