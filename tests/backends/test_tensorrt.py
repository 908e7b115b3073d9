"""The TensorRT backend against the oracle, whole, on doubles of TensorRT and CUDA (fake_tensorrt, fake_cuda).

Every line of the backend runs here but the calls into the real libraries. What the doubles prove and what they cannot
is said in their modules; tests marked `gpu` (test_tensorrt_gpu) are what runs on real ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle import Bundle
from d3tom_export.config import CacheMergeConfig, GenerationConfig, MergeConfig
from d3tom_export.engines.record import Target
from d3tom_export.model.lavida import Lavida
from d3tom_export.pipeline import Prompt, Reader, run_loop
from d3tom_export.samples import Sample
from d3tom_export.validate import validate_backends
from tests.backends.fake_engines import Machine, linked_bundle, write_engines
from tests.backends.test_onnxruntime import PICTURES, assert_same
from tests.conftest import BuildBundle, picture

FP32 = Target("tensorrt", 89, "fp32")


@pytest.fixture(scope="module")
def engines(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The synthetic bundle for both loops, with float32 engines for SM89."""
    linked = linked_bundle(bundle, tmp_path_factory.mktemp("engines"))
    write_engines(linked, FP32)
    return linked


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture(scope="module")
def cached_oracle(bundle: Bundle, eager_model: Lavida) -> PyTorchBackend:
    return PyTorchBackend(eager_model, bundle.manifest.merge, kv_cache=True)


@pytest.fixture(scope="module")
def reader(bundle: Bundle) -> Reader:
    return Reader.from_folder(bundle.folder, bundle.config)


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "plain"])
def test_one_bundle_serves_pictures_of_every_size_on_both_loops(
    engines: Bundle,
    machine: Machine,
    oracle: PyTorchBackend,
    cached_oracle: PyTorchBackend,
    reader: Reader,
    cuda_graphs: bool,
) -> None:
    samples = [Sample("What is it?", picture(*size, seed)) for seed, size in enumerate(PICTURES)]
    pairs = [
        (oracle, machine.backend(engines, "uncached", cuda_graphs=cuda_graphs)),
        (cached_oracle, machine.backend(engines, "cached", cuda_graphs=cuda_graphs)),
    ]
    generation = GenerationConfig(gen_length=8)
    report = validate_backends(pairs, reader.config, reader, samples, generation, engines.manifest.merge)
    assert report.passed, report
    assert report.steps == 2 * 8 * len(PICTURES)
