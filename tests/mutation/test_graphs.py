"""Faults in graphs, in float32: standard ones on one worker, tuned ones on another (test_tuned_graphs.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutation.catalogue import GRAPHS
from tests.mutation.fault import Fault, Subjects, validate
from tests.mutation.parameters import parameters


@pytest.mark.parametrize("loop", ["--no-kv-cache", "--kv-cache"])
def test_the_right_bundle_passes(subjects: Subjects, tmp_path: Path, loop: str) -> None:
    folder = tmp_path / "bundle"
    folder.symlink_to(subjects.small)
    outcome = validate(folder, ["--model", str(subjects.checkpoint), loop, "--graphs", "standard"])
    assert outcome.caught_by is None, outcome.figures


@pytest.mark.parametrize("fault", parameters([fault for fault in GRAPHS if fault.place.startswith("standard")]))
def test_standard_graphs(fault: Fault, judge: Callable[[Fault], None]) -> None:
    judge(fault)
