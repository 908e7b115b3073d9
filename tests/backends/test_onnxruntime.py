"""ONNX Runtime against the oracle: other pictures, other lengths, other cuts and policies, batches, no pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.cpu.place import tuned_graph
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Backend
from d3tom_export.loop.denoise import StepRecord, denoise
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.validate import BACKEND_TOLERANCE, validate_backends
from d3tom_export.pipeline import Reader
from d3tom_export.prompt.samples import Sample
from tests.conftest import BuildBundle, picture

PICTURES = [(64, 64), (100, 60), (37, 90), (200, 40), (30, 200), (28, 28), (5, 9)]


@pytest.fixture(scope="module")
def reader(bundle: Bundle) -> Reader:
    return Reader.from_folder(bundle.folder, bundle.config)


def _validate(
    oracle: Backend,
    backend: Backend,
    reader: Reader,
    samples: list[Sample],
    generation: GenerationConfig,
    merge: MergeConfig,
) -> None:
    report = validate_backends([(oracle, backend)], reader.config, reader, samples, generation, merge)
    assert report.passed, report
    assert report.samples == len(samples)


def test_one_bundle_serves_pictures_of_every_size(
    oracle: PyTorchBackend, ort_backend: OnnxRuntimeBackend, reader: Reader, bundle: Bundle
) -> None:
    samples = [Sample("What is it?", picture(*size, seed)) for seed, size in enumerate(PICTURES)]
    generation = GenerationConfig(gen_length=8)
    lengths = {
        len(reader.read(ort_backend, s.question, [s.picture], generation).visual_positions)
        for s in samples
        if s.picture is not None
    }
    assert len(lengths) >= 4
    _validate(oracle, ort_backend, reader, samples, generation, bundle.manifest.merge)


@pytest.mark.parametrize(
    "settings",
    [
        {"gen_length": 1},
        {"gen_length": 5},
        {"gen_length": 24, "block_length": 8, "step_ratio": 0.5, "schedule": "shift"},
        {"gen_length": 12, "schedule": "cosine", "step_ratio": 0.5, "remasking": "margin"},
        {"gen_length": 6, "temperature": 0.7, "seed": 3, "remasking": "entropy"},
    ],
)
def test_one_bundle_serves_every_answer_length_and_plan(
    oracle: PyTorchBackend, ort_backend: OnnxRuntimeBackend, reader: Reader, bundle: Bundle, settings: dict
) -> None:
    samples = [Sample("A question that is somewhat longer?", picture(60, 80, 5))]
    _validate(oracle, ort_backend, reader, samples, GenerationConfig(**settings), bundle.manifest.merge)


@pytest.mark.parametrize(("ratio", "schedule"), [(0.0, "fixed"), (0.3, "adaptive"), (0.99, "fixed"), (0.5, "none")])
def test_one_bundle_serves_every_ratio(
    oracle: PyTorchBackend,
    ort_backend: OnnxRuntimeBackend,
    reader: Reader,
    ratio: float,
    schedule: str,
) -> None:
    merge = MergeConfig(1, ratio, schedule)  # type: ignore[arg-type]
    _validate(oracle, ort_backend, reader, [Sample("Why?", picture(56, 56))], GenerationConfig(gen_length=6), merge)


def test_several_pictures_and_none(
    oracle: PyTorchBackend, ort_backend: OnnxRuntimeBackend, reader: Reader, bundle: Bundle
) -> None:
    generation = GenerationConfig(gen_length=6)
    for pictures in ([], [picture(30, 30, 1), picture(60, 28, 2)]):
        runs = []
        for backend in (oracle, ort_backend):
            prompt = reader.read(backend, "And?", pictures, generation)
            assert bool(len(prompt.visual_positions)) == bool(pictures)
            session = backend.start(prompt.embeddings, prompt.visual_positions)
            runs.append(
                list(
                    denoise(
                        session,
                        batch=1,
                        visual_tokens=len(prompt.visual_positions),
                        mask_token_id=258,
                        generation=generation,
                        merge=bundle.manifest.merge,
                        logits=True,
                    )
                )
            )
        assert_same(*runs)


def assert_same(expected: list[StepRecord], found: list[StepRecord]) -> None:
    for want, have in zip(expected, found, strict=True):
        assert np.array_equal(want.tokens, have.tokens)
        assert np.array_equal(want.transfer, have.transfer)
        assert (want.result.kept is None) == (have.result.kept is None)
        if want.result.kept is not None:
            assert np.array_equal(want.result.kept, have.result.kept)
        np.testing.assert_allclose(want.result.logits, have.result.logits, atol=BACKEND_TOLERANCE)


def test_pictures_merged_at_the_first_layer(build_bundle: BuildBundle, eager_model: Lavida) -> None:
    """There all newline tokens of a picture are one vector: tokens tie between three and more of them."""
    merge, generation = MergeConfig(0, 0.7), GenerationConfig(gen_length=8)
    bundle = build_bundle(merge)
    reader = Reader.from_folder(bundle.folder, bundle.config)
    samples = [Sample("What is it?", picture(*size, seed)) for seed, size in enumerate(PICTURES[:3])]
    pair = (PyTorchBackend(eager_model, merge), OnnxRuntimeBackend(bundle, device="cpu"))
    report = validate_backends([pair], reader.config, reader, samples, generation, merge)
    assert report.passed, report


@pytest.mark.parametrize(
    "merge",
    [
        MergeConfig(0, 0.7),
        MergeConfig(3, 0.7),
        MergeConfig(2, 0.6, aggregate="mean", positions="original"),
        MergeConfig(2, 0.6, select="fastv"),
        MergeConfig(2, 0.6, select="random"),
        MergeConfig(1, 0.6, select="uniform"),
    ],
    ids=str,
)
def test_every_cut_and_policy_in_a_batch(build_bundle: BuildBundle, eager_model: Lavida, merge: MergeConfig) -> None:
    prompts = np.random.default_rng(1).normal(size=(3, 41, 32)).astype(np.float32)
    positions = np.arange(4, 35)
    runs = []
    for backend in (PyTorchBackend(eager_model, merge), OnnxRuntimeBackend(build_bundle(merge), device="cpu")):
        session = backend.start(prompts, positions)
        generation = GenerationConfig(gen_length=6, seed=1)
        runs.append(
            list(
                denoise(
                    session,
                    batch=3,
                    visual_tokens=31,
                    mask_token_id=258,
                    generation=generation,
                    merge=merge,
                    logits=True,
                )
            )
        )
    assert_same(*runs)
    assert runs[0][-1].merged


def test_greedy_runs_agree_with_and_without_logits(ort_backend: OnnxRuntimeBackend, reader: Reader) -> None:
    """Token and confidence come from the graph either way; logits are only fetched beside them."""
    generation = GenerationConfig(gen_length=8)
    prompt = reader.read(ort_backend, "What?", [picture(40, 60)], generation)

    def tokens(logits: bool) -> list[int]:
        session = ort_backend.start(prompt.embeddings, prompt.visual_positions)
        *_, last = denoise(
            session,
            batch=1,
            visual_tokens=len(prompt.visual_positions),
            mask_token_id=258,
            generation=generation,
            merge=MergeConfig(1, 0.7),
            logits=logits,
        )
        return last.tokens[0].tolist()

    assert tokens(True) == tokens(False)


def test_running_a_bundle_imports_no_torch(bundle: Bundle, tmp_path: Path) -> None:
    image = tmp_path / "picture.png"
    picture(50, 70).save(image)
    script = f"""
import sys
from d3tom_export.cli.main import main
try:
    main(["run", {str(bundle.folder)!r}, "--image", {str(image)!r}, "--prompt", "What?"])
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = sorted({{"torch", "transformers", "onnx", "onnxscript"}} & set(sys.modules))
assert not heavy, heavy
assert "onnxruntime" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_a_process_of_our_own_shares_its_threads(bundle: Bundle) -> None:
    """ONNX Runtime then refuses sessions with threads of their own: an application's must keep working."""
    script = f"""
import os, sys
import onnxruntime
from pathlib import Path
from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.bundle.folder import load_bundle
from d3tom_export.process import claim
ours = sys.argv[1:] == ["ours"]
if ours:
    claim()
folder = Path({str(bundle.folder)!r})
backend = OnnxRuntimeBackend(load_bundle(folder), device="cpu")
if not ours:
    onnxruntime.InferenceSession(str(folder / "embed.onnx"), providers=["CPUExecutionProvider"])
print(len(os.listdir("/proc/self/task")))
"""
    runs = [
        subprocess.run([sys.executable, "-c", script, *whose], capture_output=True, text=True, check=False)
        for whose in ([], ["ours"])
    ]
    assert [run.returncode for run in runs] == [0, 0], runs
    theirs, ours = (int(run.stdout) for run in runs)
    assert ours < theirs or os.cpu_count() == 1


def test_a_stage_that_cannot_load_is_named(bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    import onnx

    from d3tom_export.bundle.folder import write_manifest

    folder = Path(shutil.copytree(bundle.folder, tmp_path / "broken"))
    path = tuned_graph(folder, "fp32", "merge")
    model = onnx.load(path, load_external_data=False)
    model.graph.node[0].input[0] = "nowhere"  # operators and tensors are ours, so it gets as far as ONNX Runtime
    path.write_bytes(model.SerializeToString())
    write_manifest(folder, bundle.manifest)
    with pytest.raises(D3tomError, match="cannot load stage merge"):
        OnnxRuntimeBackend(load_bundle(folder), device="cpu")
