"""Every target for a short while, on Hypothesis's choice of bytes; ``make fuzz`` goes on for longer with libFuzzer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d3tom_export.bundle.folder import Bundle

from .targets import TARGETS, scratch_of


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_give_a_result_or_one_paragraph(
    name: str, checkpoint_folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    run = TARGETS[name](scratch_of(name, checkpoint_folder, bundle.folder, tmp_path))

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=48))
    def fuzz(data: bytes) -> None:
        run(data)

    fuzz()
