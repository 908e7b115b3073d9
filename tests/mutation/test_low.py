"""Faults in fp16, bf16 and int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutation.catalogue import LOW
from tests.mutation.fault import Fault, Precision, Subjects, validate
from tests.mutation.low import arguments_of, stub
from tests.mutation.parameters import parameters

pytestmark = pytest.mark.slow  # each fault is run in step with the oracle and its witness, over every probe


@pytest.mark.parametrize("loop", ["--no-kv-cache", "--kv-cache"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_right_backend_passes(subjects: Subjects, tmp_path: Path, precision: Precision, loop: str) -> None:
    folder = tmp_path / "bundle"
    folder.symlink_to(subjects.small)
    with stub():
        outcome = validate(folder, ["--model", str(subjects.checkpoint), *arguments_of(precision, loop)])
    assert outcome.caught_by is None, outcome.figures


@pytest.mark.parametrize("loop", ["--no-kv-cache", "--kv-cache"])
def test_the_right_int8_graphs_pass(subjects: Subjects, tmp_path: Path, loop: str) -> None:
    folder = tmp_path / "bundle"
    folder.symlink_to(subjects.bundled)
    outcome = validate(folder, ["--precision", "int8", "--samples", "2", loop])
    assert outcome.caught_by is None, outcome.figures


@pytest.mark.parametrize("fault", parameters(LOW))
def test_low(fault: Fault, judge: Callable[[Fault], None]) -> None:
    judge(fault)
