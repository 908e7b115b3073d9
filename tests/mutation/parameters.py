"""Faults as parameters of tests."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.mutation.fault import Fault


def parameters(faults: Sequence[Fault]) -> list:
    """One parameter for each, marked slow where the fault is."""
    return [pytest.param(fault, id=fault.id, marks=[pytest.mark.slow] if fault.slow else []) for fault in faults]
