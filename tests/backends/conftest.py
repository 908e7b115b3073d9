"""Fixtures of the TensorRT backend's tests: a bundle with engines, and a machine that runs them, both doubles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.engines.record import Target
from d3tom_export.model.lavida import Lavida
from tests.backends.fake_engines import Machine, own_bundle, write_engines

FP32 = Target("tensorrt", (89,), "fp32")


@pytest.fixture(scope="session")
def engines(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The synthetic bundle for both loops, with float32 engines of TensorRT for SM89."""
    own = own_bundle(bundle, tmp_path_factory.mktemp("engines"))
    write_engines(own, FP32)
    return own


@pytest.fixture
def machine() -> Iterator[Machine]:
    with pytest.MonkeyPatch.context() as patch:
        yield Machine(patch)


@pytest.fixture(scope="session")
def cached_oracle(bundle: Bundle, eager_model: Lavida) -> PyTorchBackend:
    """The eager model merging as ``bundle`` does, with the prompt's keys and values kept."""
    return PyTorchBackend(eager_model, bundle.manifest.merge, kv_cache=True)
