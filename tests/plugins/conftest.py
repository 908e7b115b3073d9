"""The interpreter's worker process, one for all tests of the plugins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.plugins.interpreter import Interpret, interpreter


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    """Runs a function of :mod:`tests.plugins.interpreter` in the worker."""
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed here")
    with interpreter() as run:
        yield run
