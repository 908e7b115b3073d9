"""Faults as parameters of tests."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.mutation.fault import Fault


def parameters(faults: Sequence[Fault]) -> list:
    """One parameter for each, marked slow where the fault is, and expected to fail where it is known to be missed."""

    def marks(fault: Fault) -> list:
        slow = [pytest.mark.slow] if fault.slow else []
        return slow + ([pytest.mark.xfail(reason=f"missed: {fault.missed}", strict=True)] if fault.missed else [])

    return [pytest.param(fault, id=fault.id, marks=marks(fault)) for fault in faults]
