"""Faults in weights, config, manifest and whole files, and in what a build writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutation.building import build_of
from tests.mutation.catalogue import STORED
from tests.mutation.fault import Fault, Subjects, sign, validate
from tests.mutation.parameters import parameters


def test_a_bundle_signed_anew_passes_without_a_checkpoint(subjects: Subjects, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(subjects.small, tmp_path / "bundle"))
    sign(folder)
    assert validate(folder, []).caught_by is None


def test_the_right_build_passes(subjects: Subjects, tmp_path: Path) -> None:
    assert build_of(subjects, tmp_path, None).caught_by is None


@pytest.mark.parametrize("fault", parameters(STORED))
def test_stored(fault: Fault, judge: Callable[[Fault], None]) -> None:
    judge(fault)
