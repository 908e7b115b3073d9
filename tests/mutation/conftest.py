"""The suite's bundles are those that the session has anyway; faults are put into copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from d3tom_export.bundle.folder import Bundle
from tests.mutation.fault import Fault, Subjects
from tests.mutation.table import PROPERTY


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch's threads wait by spinning; beside ONNX Runtime's own, on two cores, that takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def subjects(checkpoint_folder: Path, bundle: Bundle, request: pytest.FixtureRequest) -> Subjects:
    return Subjects(checkpoint_folder, bundle.folder, lambda: request.getfixturevalue("int8_bundle").folder)


@pytest.fixture
def judge(
    subjects: Subjects, tmp_path: Path, record_property: Callable[[str, object], None]
) -> Callable[[Fault], None]:
    """Puts a fault in and holds the product's answer against what the catalogue says."""

    def run(fault: Fault) -> None:
        outcome = fault.run(subjects, tmp_path)
        passed = "listed" if fault.reason is not None else "missed"
        record_property(PROPERTY, passed if outcome.caught_by is None else "caught")
        if fault.reason is not None:
            assert fault.by_chance or outcome.caught_by is None, (
                f"{fault.id} is on the list of faults that may pass ({fault.reason}), and {outcome.caught_by} caught "
                f"it: {outcome.figures}. Take it off the list."
            )
            return
        assert fault.answered(outcome), f"{fault.id} was not caught as it must be: {outcome}"

    return run
