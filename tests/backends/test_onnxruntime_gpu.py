"""ONNX Runtime's providers for GPUs on a GPU: whole answers against the oracle. Skipped with the reason elsewhere."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.onnxruntime_options import PROVIDERS, Provider
from d3tom_export.backends.onnxruntime_providers import problem_of
from d3tom_export.backends.pytorch import PRECISIONS, PyTorchBackend
from d3tom_export.bundle.folder import Bundle, write_manifest
from d3tom_export.bundle.half import HALF_PRECISIONS, HalfPrecision
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import LOOPS, Loop
from d3tom_export.engines.half import write_half
from d3tom_export.parity.agreement import compare_in_step
from d3tom_export.parity.validate import validate_backends
from d3tom_export.pipeline import Reader
from d3tom_export.prompt.samples import samples_for

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[provider for provider in PROVIDERS if provider != "cpu"])
def provider(request: pytest.FixtureRequest) -> Provider:
    """Each provider that works here; the others are skipped with what they lack."""
    problem = problem_of(request.param)
    if problem:
        pytest.skip(f"{request.param} on ONNX Runtime: {problem}")
    return request.param


@pytest.mark.parametrize("loop", LOOPS)
def test_float32_agrees_with_the_oracle(tiny_bundle: Bundle, provider: Provider, loop: Loop) -> None:
    manifest, config = tiny_bundle.manifest, tiny_bundle.config
    oracle = PyTorchBackend(load_model(open_checkpoint(tiny_bundle.folder)), manifest.merge, kv_cache=loop == "cached")
    pair = (oracle, OnnxRuntimeBackend(tiny_bundle, loop, device=provider))
    samples, reader = samples_for(tiny_bundle.folder, config, 2), Reader.of_bundle(tiny_bundle)
    report = validate_backends([pair], config, reader, samples, manifest.generation, manifest.merge)
    assert report.passed, report.lines()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("precision", HALF_PRECISIONS)
def test_half_precision_agrees_with_the_oracle_in_the_same(
    tiny_bundle: Bundle, provider: Provider, precision: HalfPrecision, loop: Loop, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    write_half(folder, tiny_bundle.manifest.stages, precision)
    bundle = replace(tiny_bundle, folder=folder, files=write_manifest(folder, tiny_bundle.manifest))
    manifest, config = bundle.manifest, bundle.config
    model = load_model(open_checkpoint(folder)).to(PRECISIONS[precision])
    oracle = PyTorchBackend(model, manifest.merge, kv_cache=loop == "cached")
    pair = (oracle, OnnxRuntimeBackend(bundle, loop, device=provider, precision=precision))
    samples, reader = samples_for(folder, config, 2), Reader.of_bundle(bundle)
    report = compare_in_step([pair], config, reader, samples, manifest.generation, manifest.merge)
    assert report.passed, report.lines()
