"""The TensorRT backend against the oracle, whole, on doubles of TensorRT and CUDA (fake_tensorrt, fake_cuda).

Every line of the backend runs here but the calls into the real libraries. What the doubles prove and what they cannot
is said in their modules; what runs on a real GPU is in test_tensorrt_gpu.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import LOOPS, CacheMergeConfig, GenerationConfig, Loop, MergeConfig
from d3tom_export.engines.record import EnginePrecision, Target
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.agreement import compare_in_step
from d3tom_export.parity.validate import validate_backends
from d3tom_export.pipeline import Reader, run_loop
from d3tom_export.prompt.samples import SAMPLES_FILE, Sample, load_samples
from tests.backends.conftest import FP32
from tests.backends.fake_engines import BUNDLED, Machine, own_bundle, write_engines
from tests.backends.test_onnxruntime import assert_same
from tests.conftest import TINY_MERGE, BuildBundle, picture


def prompt_of(batch: int, prompt_tokens: int, *visual: range) -> Prompt:
    """Seeded embeddings of width 32, with visual tokens at the positions ``visual``."""
    embeddings = np.random.default_rng(prompt_tokens).normal(size=(batch, prompt_tokens, 32)).astype(np.float32)
    positions = np.concatenate([np.arange(0), *visual]).astype(np.int64)
    return Prompt(embeddings, positions)


PLAIN, BLOCKS = GenerationConfig(gen_length=6), GenerationConfig(gen_length=12, block_length=4, schedule="shift")
ONE, THREE = prompt_of(1, 41, range(4, 35)), prompt_of(3, 60, range(2, 20), range(25, 51))
SAMPLING = GenerationConfig(gen_length=5, temperature=0.7, seed=3, remasking="entropy")

RULES = [
    (GenerationConfig(12, 4, commit="threshold", threshold=0.8), MergeConfig(1, 0.7)),
    (GenerationConfig(12, 6, commit="factor"), MergeConfig(1, 0.9)),
    (GenerationConfig(12, 6, commit="frechet"), MergeConfig(1, 0.7)),
    (GenerationConfig(12, commit="threshold", max_steps=4), MergeConfig(1, 0.7)),
    (
        GenerationConfig(12, 6, commit="factor", factor=1.5, end_ids=tuple(range(0, 250, 3)), fill_after_end=True),
        MergeConfig(1, 0.7, deciders="looking"),
    ),
]
"""Answers without a plan."""

UNCACHED = [
    *((THREE, *rule) for rule in RULES),
    (ONE, PLAIN, MergeConfig(1, 0.7)),
    (THREE, PLAIN, MergeConfig(1, 0.7)),
    (ONE, BLOCKS, MergeConfig(1, 0.9, "fixed")),
    (prompt_of(2, 20), PLAIN, MergeConfig(1, 0.7)),
    (ONE, SAMPLING, MergeConfig(1, 0.7, keep_multiple=8)),
    (ONE, GenerationConfig(gen_length=1), MergeConfig(1, 0.7)),
    (ONE, PLAIN, MergeConfig(1, 0.0, "fixed")),
    (ONE, PLAIN, MergeConfig(1, 0.7, "none")),
]
CACHED = [
    *((THREE, *rule) for rule in RULES),
    (ONE, BLOCKS, MergeConfig(1, 0.7)),
    (THREE, PLAIN, MergeConfig(1, 0.7)),
    (ONE, BLOCKS, MergeConfig(1, 0.7, cache=CacheMergeConfig(remerge="on-change"))),
    (ONE, BLOCKS, MergeConfig(1, 0.6, cache=CacheMergeConfig(adaptive=True, remerge="per-block"))),
    (prompt_of(2, 20), PLAIN, MergeConfig(1, 0.7)),
    # Rounded up to V, the second half of each block merges nothing: the full cache comes back in between.
    (ONE, BLOCKS, MergeConfig(1, 0.3, cache=CacheMergeConfig(adaptive=True), keep_multiple=16)),
    (ONE, SAMPLING, MergeConfig(1, 0.7)),
    (ONE, PLAIN, MergeConfig(1, 0.0)),
    (ONE, PLAIN, MergeConfig(1, 0.7, "none")),
]


def _answer(backend: Backend, scenario: tuple[Prompt, GenerationConfig, MergeConfig]) -> list[StepRecord]:
    prompt, generation, merge = scenario
    return list(run_loop(backend, prompt, 258, generation, merge, logits=True))


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "plain"])
@pytest.mark.parametrize("loop", LOOPS)
def test_answers_of_every_size_and_plan_one_after_another(
    engines: Bundle,
    machine: Machine,
    oracle: PyTorchBackend,
    cached_oracle: PyTorchBackend,
    loop: Loop,
    cuda_graphs: bool,
) -> None:
    """One backend, whose buffers grow and whose graphs come, go and are looked for again in between."""
    backend = machine.backend(engines, loop, cuda_graphs=cuda_graphs, most_graphs=7)
    scenarios = CACHED if loop == "cached" else UNCACHED
    expected = [
        _expected(cached_oracle if loop == "cached" else oracle, loop, index) for index in range(len(scenarios))
    ]
    for _ in range(2):
        for scenario, records in zip(scenarios, expected, strict=True):
            for _ in range(3 if cuda_graphs else 1):
                assert_same(records, _answer(backend, scenario))
    counts = backend.graph_counts
    assert len(machine.device.graphs) <= 7
    assert (min(counts.captured, counts.launched, counts.evicted) > 7) == cuda_graphs
    assert any(record.merged for records in expected for record in records)


_oracles: dict[tuple[Loop, int], list[StepRecord]] = {}


def _expected(oracle: PyTorchBackend, loop: Loop, index: int) -> list[StepRecord]:
    """What the oracle answers, computed once."""
    if (loop, index) not in _oracles:
        _oracles[loop, index] = _answer(oracle, (CACHED if loop == "cached" else UNCACHED)[index])
    return _oracles[loop, index]


def test_pictures_and_questions_without_any(
    engines: Bundle, machine: Machine, oracle: PyTorchBackend, cached_oracle: PyTorchBackend
) -> None:
    samples = [
        Sample("What is it?", picture(100, 60)),
        Sample("And this one?", picture(30, 200, 1)),
        Sample("Why?", None),
    ]
    pairs = [(oracle, machine.backend(engines, "uncached")), (cached_oracle, machine.backend(engines, "cached"))]
    reader, generation = Reader.of_bundle(engines), GenerationConfig(gen_length=5)
    report = validate_backends(pairs, reader.config, reader, samples, generation, engines.manifest.merge)  # type: ignore[arg-type]
    assert report.passed, report
    assert (report.samples, report.steps) == (6, 30)


@pytest.mark.parametrize(
    ("merge", "loop"),
    [
        (MergeConfig(2, 0.6, aggregate="mean", positions="original"), "uncached"),
        (MergeConfig(2, 0.6, select="random"), "uncached"),
        (MergeConfig(3, 0.7), "cached"),  # no layer behind l*: nothing to merge but the choice
    ],
    ids=str,
)
def test_policies_and_cuts_in_a_batch(
    build_bundle: BuildBundle,
    eager_model: Lavida,
    machine: Machine,
    tmp_path: Path,
    merge: MergeConfig,
    loop: Loop,
) -> None:
    own = own_bundle(build_bundle(merge, (loop,)), tmp_path / "bundle")
    write_engines(own, FP32)
    oracle, backend = PyTorchBackend(eager_model, merge, kv_cache=loop == "cached"), machine.backend(own, loop)
    for prompt in (THREE, prompt_of(1, 20)):
        scenario = prompt, GenerationConfig(gen_length=6, block_length=3, seed=1), merge
        expected = _answer(oracle, scenario)
        for _ in range(3):
            assert_same(expected, _answer(backend, scenario))
    assert backend.graph_counts.launched


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-2), ("bf16", 2e-1)])
@pytest.mark.parametrize("loop", LOOPS)
def test_low_precisions_pass_rounded_tensors_from_stage_to_stage(
    bundle: Bundle,
    machine: Machine,
    oracle: PyTorchBackend,
    cached_oracle: PyTorchBackend,
    tmp_path: Path,
    precision: EnginePrecision,
    loop: Loop,
    tolerance: float,
) -> None:
    """The double computes in float32 and rounds between stages, so this is about dtypes and sizes, not accuracy."""
    own = own_bundle(bundle, tmp_path / "bundle")
    write_engines(own, FP32)
    write_engines(own, Target("tensorrt", (89,), precision))
    backend = machine.backend(own, loop, precision=precision)
    assert backend.precision == precision
    # An answer's first step: the later ones may depart by a token.
    first, *_ = _expected(cached_oracle if loop == "cached" else oracle, loop, 0)
    found, *_ = _answer(backend, (CACHED if loop == "cached" else UNCACHED)[0])
    assert found.result.logits is not None
    assert first.result.logits is not None
    difference = np.abs(found.result.logits - first.result.logits)
    scale = np.abs(first.result.logits).max()
    assert 1e-6 < difference.max() / scale < tolerance


@pytest.mark.parametrize("loop", LOOPS)
def test_engines_graphs_in_fp16_agree_with_pytorch_in_fp16(
    half_bundle: Bundle, tiny_bundle: Bundle, machine: Machine, tmp_path: Path, loop: Loop
) -> None:
    """The graphs that engines are built from, with their own dtypes; compared as ``validate`` compares them."""
    own = own_bundle(half_bundle, tmp_path / "bundle")
    write_engines(own, Target("tensorrt", (89,), "fp16"), shapes=BUNDLED, source=tiny_bundle)
    model = load_model(open_checkpoint(half_bundle.folder)).half()
    pair = PyTorchBackend(model, TINY_MERGE, kv_cache=loop == "cached"), machine.backend(own, loop)
    reader, generation = Reader.of_bundle(own), own.manifest.generation.changed(steps=4)
    samples = load_samples(bundled_model() / SAMPLES_FILE)[:1]
    report = compare_in_step([pair], reader.config, reader, samples, generation, TINY_MERGE)
    assert report.precision == "fp16"
    assert report.true_flips == 0
    assert report.token_agreement > 0.9
    assert not [problem for problem in report.problems if "kept" not in problem]


@cache
def _tiny_model() -> Lavida:
    return load_model(open_checkpoint(bundled_model()))


@pytest.mark.parametrize("loop", LOOPS)
def test_the_bundled_model(tiny_bundle: Bundle, machine: Machine, tmp_path: Path, loop: Loop) -> None:
    own = own_bundle(tiny_bundle, tmp_path / "bundle")
    write_engines(own, FP32, shapes=BUNDLED)
    scenes = {scene.picture.size: scene for scene in load_samples(bundled_model() / SAMPLES_FILE) if scene.picture}
    samples = [next(iter(scenes.values())), Sample("What do you see?", None)]
    pair = PyTorchBackend(_tiny_model(), TINY_MERGE, kv_cache=loop == "cached"), machine.backend(own, loop)
    reader, generation = Reader.of_bundle(own), own.manifest.generation.changed(steps=4)
    report = validate_backends([pair], reader.config, reader, samples, generation, TINY_MERGE)
    assert report.passed, report
    assert (report.samples, report.exact_match) == (2, report.exact_match_reference)
