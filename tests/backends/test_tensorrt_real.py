"""The TensorRT backend on the real libraries: as far as a machine without a GPU goes, and (marked `gpu`) all the way.

Without a GPU, TensorRT-RTX builds the engines, with the plugin in them, and everything the backend does before a plan
is deserialized runs on them; then TensorRT itself says that there is no driver. The tests marked `gpu` build engines
for the GPU at hand and run whole answers on them. They are skipped, with the reason, where there is none.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from d3tom_export.backends import tensorrt
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.backends.tensorrt import TensorRTBackend
from d3tom_export.backends.tensorrt_engines import check_architecture, checked_engines
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.config import LOOPS, CacheMergeConfig, Loop, MergeConfig
from d3tom_export.engines.build import EngineOptions, build_engines
from d3tom_export.engines.cuda import Gpu, gpus
from d3tom_export.engines.record import EnginePrecision, MergeOp, Target, plan_file
from d3tom_export.engines.toolkit import TOOLKITS, Toolkit, load_toolkit
from d3tom_export.errors import D3tomError
from d3tom_export.parity.validate import BACKEND_TOLERANCE, Report, compare_runs, expected_from_records
from d3tom_export.pipeline import run_loop
from tests.backends.fake_cuda import FakeDevice
from tests.backends.fake_engines import ADA, WIDE
from tests.backends.test_tensorrt import BLOCKS, CACHED, ONE, PLAIN, UNCACHED


def _copy(bundle: Bundle, folder: Path) -> Bundle:
    return load_bundle(shutil.copytree(bundle.folder, folder))


@pytest.fixture(scope="module")
def ahead(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Toolkit, Target]:
    """Real engines of TensorRT-RTX for SM89, with the plugin, built ahead of time in bf16."""
    try:
        toolkit = load_toolkit("tensorrt-rtx")
    except D3tomError as error:
        pytest.skip(str(error))
    copy, target = _copy(bundle, tmp_path_factory.mktemp("ahead") / "bundle"), Target("tensorrt-rtx", (89,), "bf16")
    build_engines(copy, [target], EngineOptions(WIDE))
    return load_bundle(copy.folder), toolkit, target  # with the engines among its listed files


def test_engines_as_they_are_built_pass_every_check_before_deserialization(
    ahead: tuple[Bundle, Toolkit, Target],
) -> None:
    bundle, toolkit, target = ahead
    layers = {loop: checked_engines(bundle, loop, target, toolkit) for loop in LOOPS}
    for loop, engines in layers.items():
        assert set(engines) == set(bundle.stages(loop)) - {"prefill"}
        for record, plan in engines.values():
            assert plan.stat().st_size == record.plan_bytes
    assert layers["uncached"]["merge"][0].plugin_layers == 1
    dtypes = {tensor.name: tensor.dtype for tensor in layers["cached"]["decide"][0].inputs}
    assert (dtypes["hidden"], dtypes["attention_keys_1"]) == ("bfloat16", "bfloat16")
    assert (dtypes["deciders"], dtypes["keep"]) == ("bool", "int64")
    assert all(tensor.dtype == "bfloat16" for tensor in layers["cached"]["merge"][0].outputs)


def test_real_engines_are_refused_by_the_driver_that_is_not_there_and_by_nothing_else(
    ahead: tuple[Bundle, Toolkit, Target], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Up to ``deserialize_cuda_engine`` of the real TensorRT-RTX; behind it, nothing can be shown without a GPU."""
    with suppress(D3tomError):
        pytest.skip(f"there is a GPU: {gpus()[0]}")
    bundle, *_ = ahead
    monkeypatch.setattr(tensorrt, "gpus", lambda: [ADA])
    monkeypatch.setattr(tensorrt, "CudaDevice", FakeDevice)
    with pytest.raises(D3tomError, match=r"cannot load engine .*vision.plan: .*CUDA driver version is insufficient"):
        TensorRTBackend(bundle, "uncached", "tensorrt-rtx")

    broken = _copy(bundle, tmp_path / "bundle")
    plan = plan_file(broken.folder / "engines/tensorrt-rtx-sm89-bf16", "back")
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(D3tomError, match=r"back.plan is truncated"):
        TensorRTBackend(broken, "uncached", "tensorrt-rtx")


# On a GPU


class Real(NamedTuple):
    """A TensorRT that runs here, and the GPU."""

    toolkit: Toolkit
    gpu: Gpu

    def build(self, bundle: Bundle, folder: Path, precision: EnginePrecision, merge_op: MergeOp) -> Bundle:
        copy = _copy(bundle, folder)
        target = Target(self.toolkit.name, (self.gpu.sm,), precision)
        build_engines(copy, [target], EngineOptions(WIDE, merge_op))
        return copy

    def backend(self, bundle: Bundle, loop: Loop, *, cuda_graphs: bool = True) -> TensorRTBackend:
        return TensorRTBackend(bundle, loop, self.toolkit.name, cuda_graphs=cuda_graphs)


@pytest.fixture(scope="module", params=TOOLKITS)
def real(request: pytest.FixtureRequest) -> Real:
    try:
        toolkit = load_toolkit(request.param)
        gpu = gpus()[0]
        check_architecture(toolkit, gpu)
    except D3tomError as error:
        pytest.skip(str(error))
    return Real(toolkit, gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("merge_op", ["plugin", "onnx"])
@pytest.mark.parametrize("loop", LOOPS)
def test_answers_on_a_gpu_are_those_of_the_oracle(
    real: Real, bundle: Bundle, eager_model: object, tmp_path: Path, loop: Loop, merge_op: MergeOp
) -> None:
    with_engines = real.build(bundle, tmp_path / "bundle", "fp32", merge_op)
    oracle = PyTorchBackend(eager_model, bundle.manifest.merge, kv_cache=loop == "cached")  # type: ignore[arg-type]
    scenarios = CACHED if loop == "cached" else UNCACHED
    for cuda_graphs in (True, False):
        backend = real.backend(with_engines, loop, cuda_graphs=cuda_graphs)
        report = Report(backend.name, BACKEND_TOLERANCE)
        for prompt, generation, merge in scenarios:
            expected = list(run_loop(oracle, prompt, 258, generation, merge, logits=True))
            for turn in range(3):  # plainly, captured, replayed
                where = f"graphs {cuda_graphs}, {merge}, turn {turn}"
                found = run_loop(backend, prompt, 258, generation, merge, logits=True)
                compare_runs(report, where, expected_from_records(expected), found)
        assert report.passed, "\n".join(report.problems)
        if cuda_graphs and real.toolkit.name == "tensorrt":
            assert backend.graph_counts.launched


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 5e-2), ("bf16", 3e-1)])
@pytest.mark.parametrize("loop", LOOPS)
def test_low_precisions_on_a_gpu_stay_near_float32(
    real: Real,
    bundle: Bundle,
    eager_model: object,
    tmp_path: Path,
    loop: Loop,
    precision: EnginePrecision,
    tolerance: float,
) -> None:
    backend = real.backend(real.build(bundle, tmp_path / "bundle", precision, "plugin"), loop)
    oracle = PyTorchBackend(eager_model, bundle.manifest.merge, kv_cache=loop == "cached")  # type: ignore[arg-type]
    merge = MergeConfig(1, 0.7)
    (first, *_), (found, *rest) = (
        list(run_loop(side, ONE, 258, PLAIN, merge, logits=True)) for side in (oracle, backend)
    )
    assert first.result.logits is not None
    assert found.result.logits is not None
    error = np.abs(found.result.logits - first.result.logits).max() / np.abs(first.result.logits).max()
    assert error < tolerance
    assert all(record.merged and record.result.kept is not None for record in rest)


@pytest.mark.gpu
@pytest.mark.parametrize("loop", LOOPS)
def test_a_gpu_holds_no_more_after_many_answers_and_graphs_do_not_slow_it(
    real: Real, bundle: Bundle, tmp_path: Path, loop: Loop
) -> None:
    from cuda.bindings import runtime

    def used() -> int:
        _, free, total = runtime.cudaMemGetInfo()
        return total - free

    with_engines = real.build(bundle, tmp_path / "bundle", "fp16", "plugin")
    merge = replace(MergeConfig(1, 0.7), keep_multiple=8, cache=CacheMergeConfig(remerge="every-step"))
    seconds = {}
    for cuda_graphs in (False, True):
        backend = real.backend(with_engines, loop, cuda_graphs=cuda_graphs)

        def answer(backend: TensorRTBackend = backend) -> None:
            for _ in run_loop(backend, ONE, 258, BLOCKS, merge):
                pass

        for _ in range(4):
            answer()
        before, started = used(), time.perf_counter()
        for _ in range(20):
            answer()
        seconds[cuda_graphs] = (time.perf_counter() - started) / 20
        assert used() <= before
        del backend
    print(f"{real.toolkit.name} on {real.gpu}, {loop}: an answer in {seconds} s with graphs true and false")
    assert seconds[True] < 1.5 * seconds[False]
