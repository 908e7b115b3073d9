"""The interpreter's worker process and what g++ builds, one each for all tests of the plugins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins import building
from tests.plugins.harness import Libraries
from tests.plugins.interpreter import Interpret, interpreter


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    """Runs a function of :mod:`tests.plugins.interpreter` in the worker."""
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed here")
    with interpreter() as run:
        yield run


@pytest.fixture(scope="session")
def headers() -> list[str]:
    """Compiler options for the headers of TensorRT and CUDA."""
    try:
        return building.headers()
    except building.MissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def libraries(headers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    """The plugin library, its harness and the stub of the driver.

    One for the session: of two stubs, the worker would reach whichever it loaded first.
    """
    return building.build(tmp_path_factory.mktemp("libraries"))


@pytest.fixture(scope="session")
def kernels(libraries: Libraries) -> Path:
    """Folder of the kernels that the library embeds."""
    return libraries.plugin.parent / "kernels"


@pytest.fixture(scope="session")
def library_kernels(kernels: Path) -> bytes:
    """The archive of them."""
    return (kernels / "merge_kernels.bin").read_bytes()
