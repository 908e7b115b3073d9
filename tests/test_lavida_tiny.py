"""The bundled model: it really answers, its bundle matches PyTorch, one bundle serves scenes of every size."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.cli.main import main
from d3tom_export.config import LOOPS, Loop, MergeConfig
from d3tom_export.parity.validate import Report, validate_backends
from d3tom_export.pipeline import Reader, run_loop
from d3tom_export.prompt.samples import SAMPLES_FILE, Sample, load_samples
from tests.conftest import TINY_MERGE

KINDS = {"read", "count", "largest", "smallest", "place", "colour", "neighbour", "hue", "where", "describe"}


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    return load_samples(bundled_model() / SAMPLES_FILE)


def _validate(tiny_bundle: Bundle, scenes: list[Sample], steps: int | None = None) -> Report:
    """Both loops; in so many steps, or as many as the model takes."""
    reader = Reader.from_folder(tiny_bundle.folder, tiny_bundle.config)
    model = load_model(open_checkpoint(bundled_model()))
    pairs = [
        (
            PyTorchBackend(model, TINY_MERGE, kv_cache=loop == "cached"),
            OnnxRuntimeBackend(tiny_bundle, loop, device="cpu"),
        )
        for loop in LOOPS
    ]
    generation = tiny_bundle.manifest.generation
    if steps is not None:
        generation = generation.changed(steps=steps)
    return validate_backends(pairs, tiny_bundle.config, reader, scenes, generation, TINY_MERGE)


def test_there_are_512_scenes_of_every_kind_in_several_sizes(scenes: list[Sample]) -> None:
    assert len(scenes) == 512
    assert len({scene.picture.size for scene in scenes if scene.picture}) >= 4
    assert {scene.kind for scene in scenes} == KINDS


def test_scenes_of_every_size_match_pytorch_step_by_step(tiny_bundle: Bundle, scenes: list[Sample]) -> None:
    by_size = {scene.picture.size: scene for scene in scenes if scene.picture}
    report = _validate(tiny_bundle, list(by_size.values()), steps=4)
    assert report.passed, report
    assert report.steps == 2 * 4 * len(by_size)


@pytest.mark.slow
def test_more_scenes_match_pytorch(tiny_bundle: Bundle, scenes: list[Sample]) -> None:
    assert _validate(tiny_bundle, scenes[:8]).passed


@pytest.mark.parametrize("loop", ["cached", pytest.param("uncached", marks=pytest.mark.slow)])
def test_it_reads_held_out_scenes(tiny_bundle: Bundle, scenes: list[Sample], loop: Loop) -> None:
    reader, generation = Reader.of_bundle(tiny_bundle), tiny_bundle.manifest.generation
    backend = OnnxRuntimeBackend(tiny_bundle, loop, device="cpu")
    unmerged = MergeConfig(2, 0.9, "none")
    right = 0
    for scene in scenes[:20]:
        assert scene.picture is not None
        prompt = reader.read(backend, scene.question, [scene.picture], generation)
        *_, last = run_loop(backend, prompt, tiny_bundle.config.language.mask_token_id, generation, unmerged)
        right += reader.answer(last, generation).text == scene.answer
    assert right >= 18


def test_build_without_a_model_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layers = open_checkpoint(bundled_model()).config.language.n_layers
    result = CliRunner().invoke(main, ["build", "--layer", str(layers), "--ratio", "0.9"])
    assert result.exit_code == 1
    assert f"it has {layers} layers" in result.stderr
    assert list(tmp_path.iterdir()) == []
