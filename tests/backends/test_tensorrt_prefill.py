"""A prompt merged at its prefill on the TensorRT backend's doubles, against the oracle and stage by stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.backends.tensorrt_cached import engines_of
from d3tom_export.bundle.folder import Bundle
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import CacheMergeConfig, GenerationConfig, MergeConfig
from d3tom_export.engines.record import Target
from d3tom_export.engines.shapes import Range
from d3tom_export.engines.stages import PROMPT, STEP
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Prompt
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.stages import StageProbes
from d3tom_export.pipeline import run_loop
from tests.backends.conftest import FP32
from tests.backends.fake_engines import WIDE, Machine, own_bundle, write_engines
from tests.backends.test_onnxruntime import assert_same
from tests.backends.test_onnxruntime_prefill import shifted  # noqa: F401
from tests.backends.test_tensorrt import BLOCKS, ONE, PLAIN, THREE, prompt_of

MERGE = MergeConfig(layer=1, ratio=0.7, merge_at="prefill")

SCENARIOS = [
    (ONE, BLOCKS, MERGE),
    (THREE, replace(PLAIN, suffix_ids=(3, 5)), MERGE),
    (THREE, PLAIN, replace(MERGE, select="uniform")),
    (ONE, PLAIN, replace(MERGE, ratio=0.99)),
    (ONE, PLAIN, replace(MERGE, ratio=0.0)),
    (THREE, PLAIN, replace(MERGE, schedule="none")),
    (prompt_of(2, 20), PLAIN, MERGE),
    (ONE, BLOCKS, replace(MERGE, merge_at="step")),
    (ONE, BLOCKS, replace(MERGE, merge_at="step", cache=CacheMergeConfig(remerge="per-block"))),
    (ONE, BLOCKS, MERGE),
]


@pytest.fixture(scope="module")
def engines(prefill_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    own = own_bundle(prefill_bundle, tmp_path_factory.mktemp("prefill"))
    write_engines(own, FP32)
    return own


def _answer(backend, scenario: tuple[Prompt, GenerationConfig, MergeConfig], mask: int = 258) -> list[StepRecord]:  # type: ignore[no-untyped-def]
    prompt, generation, merge = scenario
    return list(run_loop(backend, prompt, mask, generation, merge, logits=True))


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "plain"])
def test_answers_of_every_kind_one_after_another(
    engines: Bundle, machine: Machine, eager_model: Lavida, cuda_graphs: bool
) -> None:
    """One backend, whose buffers hold a long prompt behind l*, then a short one, and back."""
    backend = machine.backend(engines, "cached", cuda_graphs=cuda_graphs)
    for scenario in SCENARIOS:
        expected = _answer(PyTorchBackend(eager_model, scenario[2], kv_cache=True), scenario)
        for _ in range(3 if cuda_graphs else 1):
            assert_same(expected, _answer(backend, scenario))
    assert bool(backend.graph_counts.launched) == cuda_graphs


def test_a_short_prompt_needs_no_more_than_its_rows(engines: Bundle, machine: Machine) -> None:
    """The later layers' buffers, both forms of them, as their sizes on the device are."""
    backend = machine.backend(engines, "cached", cuda_graphs=False)
    list(run_loop(backend, ONE, 258, PLAIN, MERGE))
    (memory,) = backend._loaded._workspaces[1:]
    sizes = {name: block.size for name, block in memory._on_device.items()}
    whole, short = 41 * 2 * 8 * 4, (41 - 31 + 9) * 2 * 8 * 4
    for kind in ("keys", "values"):
        assert sizes[f"{kind}_1"] >= sizes[f"attention_{kind}_1"] >= whole
        assert sizes[f"merged_{kind}_2"] == sizes[f"{kind}_2"] == -(-short // 512) * 512


def test_stages_of_the_contract_run_alone(
    engines: Bundle, machine: Machine, prefill_bundle: Bundle, eager_model: Lavida
) -> None:
    backend, reference = machine.backend(engines, "cached"), OnnxRuntimeBackend(prefill_bundle, "cached", device="cpu")
    rng = np.random.default_rng(0)
    inputs = {
        "prompt_embeddings": rng.normal(size=(3, 41, 32)).astype(np.float32),
        "visual_positions": np.arange(4, 35),
        "kept": np.sort(np.stack([rng.permutation(31)[:9] for _ in range(3)]), axis=1),
    }
    for name in ("prompt_front", "prompt_merge", "prompt_back"):
        spec = prefill_bundle.manifest.stages[name]
        given = {tensor.name: inputs[tensor.name] for tensor in spec.inputs}
        outputs = [tensor.name for tensor in spec.outputs]
        found, expected = (each.run_stage(name, given, outputs) for each in (backend, reference))
        for output in outputs:
            np.testing.assert_allclose(found[output], expected[output], atol=1e-4, rtol=0, err_msg=output)
        inputs |= expected
    probes = StageProbes()
    probes.run(engines, eager_model, backend, "cached")
    assert (probes.probed, probes.problems) == (["stages one by one [tensorrt, cached]"], [])
    assert engines_of("prompt_front", []) == [("front", PROMPT), ("decide", PROMPT)]
    assert engines_of("prompt_back", []) == [("back", PROMPT)]
    assert engines_of("prompt_merge", ["prompt_merge"]) == [("prompt_merge", STEP)]


def test_shifted_rows_and_a_mean(shifted: tuple[Bundle, Path], machine: Machine, tmp_path: Path) -> None:  # noqa: F811
    bundle, source = shifted
    merge, language = bundle.manifest.merge, bundle.config.language
    own = own_bundle(bundle, tmp_path / "bundle")
    write_engines(own, FP32)
    backend, oracle = (
        machine.backend(own, "cached"),
        PyTorchBackend(model := load_model(open_checkpoint(source)), merge, kv_cache=True),
    )
    embeddings = np.random.default_rng(3).normal(size=(3, 41, language.d_model)).astype(np.float32)
    for changes in ({}, {"schedule": "none"}):
        scenario = Prompt(embeddings, ONE.visual_positions), PLAIN, replace(merge, **changes)
        assert_same(*(_answer(side, scenario, language.mask_token_id) for side in (oracle, backend)))
    probes = StageProbes()
    probes.run(own, model, backend, "cached")
    assert probes.problems == []


def test_low_precisions_pass_rounded_tensors_on(
    prefill_bundle: Bundle, machine: Machine, eager_model: Lavida, tmp_path: Path
) -> None:
    own = own_bundle(prefill_bundle, tmp_path / "bundle")
    write_engines(own, Target("tensorrt", (89,), "bf16"))
    first, *_ = _answer(PyTorchBackend(eager_model, MERGE, kv_cache=True), SCENARIOS[0])
    found, *_ = _answer(machine.backend(own, "cached"), SCENARIOS[0])
    assert found.result.logits is not None
    assert first.result.logits is not None
    difference = np.abs(found.result.logits - first.result.logits).max() / np.abs(first.result.logits).max()
    assert 1e-6 < difference < 0.3


def test_what_engines_were_not_built_for_is_refused(
    engines: Bundle, prefill_bundle: Bundle, machine: Machine, tmp_path: Path
) -> None:
    long = replace(PLAIN, gen_length=40)
    with pytest.raises(D3tomError, match="--answer-tokens"):
        _answer(machine.backend(engines, "cached"), (ONE, long, MERGE))
    own = own_bundle(prefill_bundle, tmp_path / "bundle")
    write_engines(own, FP32, shapes=replace(WIDE, visual_tokens=Range(20, 25, 30)))
    with pytest.raises(D3tomError, match="--visual-tokens"):
        _answer(machine.backend(own, "cached"), (ONE, PLAIN, MERGE))


def test_engines_of_a_bundle_for_the_steps_refuse_the_prefill(bundle: Bundle, machine: Machine, tmp_path: Path) -> None:
    own = own_bundle(bundle, tmp_path / "bundle")
    write_engines(own, FP32)
    with pytest.raises(D3tomError, match="built with --merge-at step"):
        _answer(machine.backend(own, "cached"), SCENARIOS[0])
