"""What the TensorRT backend does to a GPU: allocations, copies, synchronizations, graphs, and what it leaves behind.

Counted on doubles (fake_cuda, fake_tensorrt), which also end a test that reads freed memory, a result before it was
waited for, or a graph whose context has changed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d3tom_export.backends.tensorrt import TensorRTBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import LOOPS, CacheMergeConfig, GenerationConfig, Loop, MergeConfig
from d3tom_export.engines.record import Target
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Prompt, StageRunner
from d3tom_export.loop.denoise import StepRecord, StepRequest
from d3tom_export.pipeline import run_loop
from tests.backends.fake_cuda import FakeDevice
from tests.backends.fake_engines import Machine, own_bundle, write_engines
from tests.backends.fake_tensorrt import CudaGraphStrategy, FakeContext
from tests.backends.test_onnxruntime import assert_same
from tests.backends.test_tensorrt import ONE, PLAIN, THREE, prompt_of

MERGE = MergeConfig(1, 0.7)
ALLOCATED = ("device", "pinned")


def _steps(
    backend: TensorRTBackend,
    prompt: Prompt = ONE,
    generation: GenerationConfig = PLAIN,
    merge: MergeConfig = MERGE,
    *,
    logits: bool = False,
) -> Iterator[StepRecord]:
    return run_loop(backend, prompt, 258, generation, merge, logits=logits)


def _allocations(device: FakeDevice) -> tuple[int, int, int, int]:
    return device.device.allocated, device.pinned.allocated, device.device.freed, device.pinned.freed


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "plain"])
@pytest.mark.parametrize("loop", LOOPS)
def test_nothing_is_allocated_after_an_answer_s_first_step_nor_for_another_answer_of_its_size(
    engines: Bundle, machine: Machine, loop: Loop, cuda_graphs: bool
) -> None:
    backend = machine.backend(engines, loop, cuda_graphs=cuda_graphs)

    def allocated() -> tuple[int, int, int, int]:
        """But for the page-locked numbers of contexts that graphs have for themselves: of two stages."""
        device, pinned, *freed = _allocations(machine.device)
        return device, pinned - 2 * backend.graph_counts.captured, *freed

    after = [allocated() for _ in _steps(backend, logits=True)]
    # The first step merges nothing, so it brings no kept set down; the second makes room for that.
    assert after[0][0] == after[-1][0]
    assert after[1:] == [after[1]] * (len(after) - 1)
    for smaller in (ONE, prompt_of(1, 30, range(3, 20)), prompt_of(1, 12), ONE):
        for _ in _steps(backend, smaller, merge=replace(MERGE, ratio=0.9)):
            assert allocated() == after[-1]


def test_only_ids_and_deciders_go_up_and_only_sampling_results_come_down(engines: Bundle, machine: Machine) -> None:
    backend, device = machine.backend(engines), machine.device
    batch, answer = 3, PLAIN.gen_length
    records = _steps(backend, THREE)
    for step, record in enumerate(records):
        up = [size for way, size in device.copies if way == "up"]
        down = [size for way, size in device.copies if way == "down"]
        prompt = [THREE.embeddings.nbytes, THREE.visual_positions.nbytes] if not step else []
        assert up == [*prompt, batch * answer * 8, batch * answer]
        kept = [batch * record.keep * 8] if record.merged else []
        assert sorted(down) == sorted([*kept, batch * answer * 8, batch * answer * 4])
        device.copies.clear()
    assert device.log == ["embed", "front", "merge", "back"] * answer


@pytest.mark.parametrize("logits", [True, False])
def test_logits_come_down_only_where_they_are_asked_for(engines: Bundle, machine: Machine, logits: bool) -> None:
    row = 8 + 4 + (4 * engines.config.language.head_rows if logits else 0)
    backend, device = machine.backend(engines, "cached"), machine.device
    for record in _steps(backend, logits=logits):
        assert (record.result.logits is not None) == logits
        down = sum(size for way, size in device.copies if way == "down")
        kept = record.keep * 8 if record.merged else 31 * 8
        assert down == PLAIN.gen_length * row + kept
        device.copies.clear()


@pytest.mark.parametrize(
    ("loop", "remerge", "waits"),
    [("uncached", "every-step", 1), ("cached", "every-step", 1), ("cached", "on-change", 2)],
)
def test_a_step_waits_once_and_twice_only_where_the_host_must_choose(
    engines: Bundle, machine: Machine, loop: Loop, remerge: str, waits: int
) -> None:
    backend, device = machine.backend(engines, loop, cuda_graphs=False), machine.device
    merge = replace(MERGE, cache=CacheMergeConfig(remerge=remerge))  # type: ignore[arg-type]
    for _ in _steps(backend, merge=merge):
        pass
    records = _steps(backend, merge=merge)
    next(records)
    before = device.synchronizations
    for record in records:
        assert device.synchronizations - before == (waits if record.merged else 1)
        before = device.synchronizations


def test_cached_steps_run_the_stages_they_need(engines: Bundle, machine: Machine) -> None:
    def stages(merge: MergeConfig) -> list[list[str]]:
        backend, found = machine.backend(engines, "cached", cuda_graphs=False), []
        for _ in _steps(backend, merge=merge):
            found.append(list(machine.device.log))
            machine.device.log.clear()
        return found

    prefill = ["front", "decide", "back", *["rotate"] * 4]
    unmerged, merging = ["embed", "front", "decide", "back"], ["embed", "front", "decide", "merge", "back"]
    assert stages(MERGE) == [prefill + unmerged, *[merging] * 5]
    assert stages(replace(MERGE, schedule="none")) == [prefill + unmerged, *[unmerged] * 5]
    held = replace(MERGE, cache=CacheMergeConfig(remerge="per-block"))
    assert stages(held) == [prefill + unmerged, merging, *[unmerged] * 4]
    _, second, *later = stages(replace(MERGE, cache=CacheMergeConfig(remerge="on-change")))
    assert second == merging
    assert all(step in (unmerged, second) for step in later)


def test_on_change_merges_again_only_where_other_tokens_are_kept(engines: Bundle, machine: Machine) -> None:
    backend = machine.backend(engines, "cached", cuda_graphs=False)
    session = backend.start(ONE.embeddings, ONE.visual_positions)
    deciders = np.zeros((1, 5), dtype=np.bool_)
    deciders[0, 1] = True
    request = StepRequest(np.full((1, 5), 258), deciders, True, 9, "if-changed", False, False)
    kept, merges = [], []
    for asked in (request, request, replace(request, keep=8), replace(request, keep=8)):
        machine.device.log.clear()
        found = session.step(asked).kept
        assert found is not None
        kept.append(found.tolist())
        merges.append(machine.device.log.count("merge"))
    assert merges == [1, 0, 1, 0]
    assert kept[0] == kept[1] != kept[2] == kept[3]


def test_a_shape_runs_plainly_then_is_captured_then_is_one_launch(engines: Bundle, machine: Machine) -> None:
    backend, device = machine.backend(engines, "cached"), machine.device
    logs = []
    for _ in _steps(backend):
        logs.append(list(device.log))
        device.log.clear()
    # K is the same from the second step on. A capture enqueues once to run and once to record.
    merging = ["embed", "front", "decide", "merge", "back"]
    assert logs[1:] == [merging, merging * 2, ["graph"], ["graph"], ["graph"]]
    counts = backend.graph_counts
    assert (counts.captured, counts.launched, counts.evicted) == (1, 3, 0)
    contexts = machine.trt.contexts  # type: ignore[union-attr]
    for _ in range(2):
        for _ in _steps(backend):
            pass
    assert backend.graph_counts.captured == 2  # the first step, at its second occurrence
    assert machine.trt.contexts == contexts + 4  # type: ignore[union-attr]


def test_an_adaptive_schedule_has_a_graph_for_each_k_and_keep_multiple_makes_them_few(
    engines: Bundle, machine: Machine
) -> None:
    generation = GenerationConfig(gen_length=12)

    def captured(merge: MergeConfig) -> tuple[int, int]:
        backend = machine.backend(engines)
        for _ in range(2):
            kept = {record.keep for record in _steps(backend, generation=generation, merge=merge)}
        return backend.graph_counts.captured, len(kept)

    graphs, shapes = captured(MERGE)
    assert graphs == shapes > 8
    graphs, shapes = captured(replace(MERGE, keep_multiple=8))
    assert graphs - 1 <= shapes <= 4  # the first step brings no kept set down: a sequence of its own
    assert captured(replace(MERGE, keep_multiple=100)) in {(2, 1), (1, 1)}


def test_keep_multiple_rounds_up_to_v_at_most(engines: Bundle, machine: Machine) -> None:
    backend = machine.backend(engines)
    plain = [record.keep for record in _steps(backend)]
    rounded = [record.keep for record in _steps(backend, merge=replace(MERGE, keep_multiple=8))]
    assert rounded == [min(31, -(-keep // 8) * 8) for keep in plain]
    assert len(set(plain)) > len(set(rounded))


def test_graphs_are_bounded_and_the_one_unused_for_longest_goes(engines: Bundle, machine: Machine) -> None:
    backend, device = machine.backend(engines, most_graphs=2), machine.device
    for _ in range(2):
        for _ in _steps(backend):
            assert len(device.graphs) <= 2
    counts = backend.graph_counts
    assert counts.captured == counts.evicted + 2 == 6
    assert _answer_logs(backend, device)[-2:] == [["graph"], ["graph"]]
    gc.collect()
    assert machine.trt is not None
    assert len(machine.trt.alive) == 4 * 3  # the common contexts, and two graphs' own


def _answer_logs(backend: TensorRTBackend, device: FakeDevice) -> list[list[str]]:
    logs = []
    device.log.clear()
    for _ in _steps(backend):
        logs.append(list(device.log))
        device.log.clear()
    return logs


def test_a_buffer_that_moves_takes_its_graphs_along(engines: Bundle, machine: Machine) -> None:
    backend, device = machine.backend(engines, "cached"), machine.device
    expected = list(_steps(backend, logits=True))
    list(_steps(backend, logits=True))
    graphs = backend.graph_counts.captured
    assert len(device.graphs) == graphs >= 2
    list(_steps(backend, prompt_of(2, 90, range(4, 70)), logits=True))
    assert backend.graph_counts.evicted == graphs
    for _ in range(3):
        assert_same(expected, list(_steps(backend, logits=True)))


def test_two_answers_in_progress_do_not_share_buffers(engines: Bundle, machine: Machine) -> None:
    for loop in LOOPS:
        backend = machine.backend(engines, loop)
        alone = [list(_steps(backend, prompt, logits=True)) for prompt in (ONE, THREE)]
        for _ in range(2):
            together = zip(_steps(backend, ONE, logits=True), _steps(backend, THREE, logits=True), strict=True)
            for expected, found in zip(alone, zip(*together, strict=True), strict=True):
                assert_same(expected, list(found))


def test_all_contexts_work_in_one_block(engines: Bundle, machine: Machine) -> None:
    backend = machine.backend(engines)
    for _ in range(3):
        list(_steps(backend))
    trt = machine.trt
    assert trt is not None
    assert trt.contexts > 8
    assert len(trt.activations) == 1


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_tensorrt_rtx_captures_by_itself(bundle: Bundle, machine: Machine, tmp_path: Path, cuda_graphs: bool) -> None:
    own = own_bundle(bundle, tmp_path / "bundle")
    write_engines(own, Target("tensorrt-rtx", (89,), "fp32"))
    backend = machine.backend(own, toolkit="tensorrt-rtx", cuda_graphs=cuda_graphs)
    for _ in range(3):
        list(_steps(backend))
    wanted = CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if cuda_graphs else CudaGraphStrategy.DISABLED
    assert machine.trt is not None
    assert machine.trt.strategies == {wanted}
    assert (backend.name, backend.graph_counts.captured, machine.trt.contexts) == ("tensorrt-rtx", 0, 4)


def test_what_was_taken_is_given_back(engines: Bundle, machine: Machine) -> None:
    backend, device = machine.backend(engines, "cached"), machine.device
    records = _steps(backend)
    next(records)
    assert device.device.blocks
    del backend
    gc.collect()
    assert not device.closed  # the answer in progress holds it
    list(records)
    del records
    gc.collect()
    assert device.closed
    assert device.device.allocated == device.device.freed


def test_stages_run_one_at_a_time_for_diagnosis(engines: Bundle, machine: Machine, bundle: Bundle) -> None:
    from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend

    # The double runs graphs like the standard ones; those rewritten for the CPU round otherwise.
    rng = np.random.default_rng(0)
    for loop in LOOPS:
        backend, other = machine.backend(engines, loop), OnnxRuntimeBackend(bundle, loop, device="cpu", tuned=False)
        assert isinstance(backend, StageRunner)
        sizes = {"B": 2, "P": 20, "G": 4, "L": 24, "V": 9, "K": 5, "M": 20, "C": 16, "S": 4, "views": 1}
        for name, key in bundle.stage_keys(loop).items():
            stage, inputs = bundle.manifest.stages[key], {}
            for tensor in stage.inputs:
                shape = [sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes]
                values = {"keep": np.array([5]), "visual_positions": np.arange(3, 12)}
                if tensor.name in ("token_ids", "deciders"):
                    values[tensor.name] = rng.integers(0, 2, shape).astype(tensor.dtype)
                if tensor.name != "answer_length":  # has a default in the bundle
                    inputs[tensor.name] = values.get(tensor.name, rng.normal(size=shape).astype(np.float32))
            if name == "back" and loop == "uncached":
                inputs["merged"] = rng.normal(size=(2, 20, 32)).astype(np.float32)
            outputs = [tensor.name for tensor in stage.outputs]
            expected, found = other.run_stage(name, inputs, outputs), backend.run_stage(name, inputs, outputs)
            assert list(found) == outputs
            for output in outputs:
                assert found[output].dtype == expected[output].dtype
                np.testing.assert_allclose(found[output], expected[output], rtol=1e-5, atol=1e-5)
        with pytest.raises(D3tomError, match="needs deciders too"):
            backend.run_stage("merge", {"hidden": np.zeros((1, 4, 32), np.float32)}, ["merged"])


def test_an_engine_that_cannot_be_captured_says_so(
    engines: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, device = machine.backend(engines, "cached"), machine.device

    def fail() -> int:
        device._capture = None
        raise D3tomError(
            "CUDA cannot record a CUDA graph: operation not permitted (cudaErrorStreamCaptureInvalidated)."
        )

    monkeypatch.setattr(device, "end_capture", fail)
    with pytest.raises(D3tomError, match=r"StreamCaptureInvalidated.*run with --no-cuda-graphs"):
        list(_steps(backend))


def test_what_tensorrt_says_is_told_with_the_failure(
    engines: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(context: FakeContext, stream: int) -> bool:
        return context._refuse("IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (no kernel image)")

    monkeypatch.setattr(FakeContext, "execute_async_v3", refuse)
    with pytest.raises(D3tomError, match=r"does not run in stage embed: .*no kernel image"):
        list(_steps(machine.backend(engines)))
