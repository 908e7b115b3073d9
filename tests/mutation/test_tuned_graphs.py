"""Faults in the graphs for the CPU, in float32, and in those that both kinds share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutation.catalogue import GRAPHS
from tests.mutation.fault import Fault, Subjects, validate
from tests.mutation.parameters import parameters

pytestmark = pytest.mark.slow  # minutes; the faults of the standard graphs stay where they are quick


@pytest.mark.parametrize("loop", ["--no-kv-cache", "--kv-cache"])
def test_the_right_bundle_passes(subjects: Subjects, tmp_path: Path, loop: str) -> None:
    folder = tmp_path / "bundle"
    folder.symlink_to(subjects.small)
    outcome = validate(folder, ["--model", str(subjects.checkpoint), loop, "--graphs", "tuned"])
    assert outcome.caught_by is None, outcome.figures


@pytest.mark.parametrize("fault", parameters([fault for fault in GRAPHS if not fault.place.startswith("standard")]))
def test_tuned_graphs(fault: Fault, judge: Callable[[Fault], None]) -> None:
    judge(fault)
