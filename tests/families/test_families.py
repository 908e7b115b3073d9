"""Every family from its checkpoint, in its exact layout, to answers: build, self-check, run, proof, engines."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import LOOPS, Loop
from d3tom_export.families.registry import FAMILIES, family_of
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.pipeline import run_loop
from tests.backends.conftest import FP32
from tests.backends.fake_engines import Machine, own_bundle, write_engines
from tests.conftest import Invoke, Shared, picture
from tests.families.checkpoints import CONFIGS, published_name, write_family

# LaViDa-LLaDA is what all other tests are about; of the others Dream's departs most.
NAMES = ("lavida-dream", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llada-v", "llada")))
LENGTH = 8


def test_every_family_has_a_checkpoint_here() -> None:
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_layout_is_read(name: str, tmp_path: Path) -> None:
    """Names are spelt out in the tests once more: every tensor is found, under the model's name for it."""
    folder = write_family(tmp_path / name, name)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.family == name
    with safe_open(folder / "model.safetensors", "np") as file:
        stored = set(file.keys())
    assert {tensor.name for tensor in checkpoint.tensors.values()} == stored
    for own, tensor in checkpoint.tensors.items():
        assert tensor.name == published_name(name, own)
    model = load_model(checkpoint)
    with safe_open(folder / "model.safetensors", "pt") as file:
        for own, parameter in model.named_parameters():
            tensor = file.get_tensor(published_name(name, own))
            assert parameter.equal(tensor[: len(parameter)])


@pytest.fixture(scope="session")
def built(shared: Shared, invoke: Invoke) -> dict[str, Path]:
    """Folders of each family's bundle for both loops, built on demand by the command, with its self-check."""

    class Built(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            def fill(folder: Path) -> None:
                source, output = write_family(folder / "source", name), folder / "bundle"
                settings = ("--layer", 1, "--ratio", 0.7, "--kv-cache", "both", "--gen-length", LENGTH)
                made = invoke("build", "--model", source, *settings, "--self-check", 1, "--output", output)
                assert made.exit_code == 0, made.output
                assert "Self-check passed: " in made.stdout

            self[name] = shared(f"family {name}", fill) / "bundle"
            return self[name]

    return Built()


@pytest.mark.parametrize("name", NAMES)
def test_it_answers_in_both_loops(name: str, built: dict[str, Path], invoke: Invoke, tmp_path: Path) -> None:
    asked = ["--prompt", "What is it?"]
    sees = FAMILIES[name].vision is not None
    if sees:
        picture(60, 40).save(tmp_path / "picture.png")
        asked += ["--image", str(tmp_path / "picture.png")]
    for loop in ("--no-kv-cache", "--kv-cache"):
        answered = invoke("run", built[name], *asked, loop, "--json", "-")
        assert answered.exit_code == 0, answered.output
        result = json.loads(answered.stdout)
        assert result["generation"]["gen_length"] == LENGTH
        assert len(result["token_ids"]) <= LENGTH
        assert bool(result["visual_tokens"]) == sees
        assert (min(result["kept"]) < result["visual_tokens"]) == sees


@pytest.mark.parametrize("name", NAMES)
def test_it_is_proven(name: str, built: dict[str, Path], invoke: Invoke) -> None:
    proven = invoke("validate", built[name], "--samples", 2, "--graphs", "tuned")
    assert proven.exit_code == 0, proven.output
    assert "PASSED" in proven.stdout


@pytest.mark.parametrize("name", NAMES)
def test_its_stages_are_engines(name: str, built: dict[str, Path], invoke: Invoke, tmp_path: Path) -> None:
    """Real ones, ahead of time for SM89."""
    folder = Path(shutil.copytree(built[name], tmp_path / "bundle"))
    arguments = ("build", "--bundle", folder, "--engine", "tensorrt-rtx", "--sm", 89, "--precision", "bf16")
    done = invoke(*arguments, "--json", "-")
    assert done.exit_code == 0, done.output
    engines = {entry["stage"] for entry in json.loads(done.stdout)["engines"]}
    assert engines == load_bundle(folder).manifest.stages.keys() - {"prefill"}


def _answers(backend: Backend, bundle: Bundle, prompt: Prompt, **settings: object) -> list[StepRecord]:
    manifest = bundle.manifest
    generation = replace(manifest.generation, **settings)  # type: ignore[arg-type]
    mask = bundle.config.language.mask_token_id
    return list(run_loop(backend, prompt, mask, generation, manifest.merge, logits=True))


def _prompt(bundle: Bundle) -> Prompt:
    """Random embeddings: text, 30 visual tokens, text."""
    rows = np.random.default_rng(0).normal(size=(1, 41, bundle.config.language.d_model)).astype(np.float32)
    return Prompt(rows, np.arange(5, 35))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", NAMES[:2])
def test_engines_answer_as_pytorch_does(
    name: str, loop: Loop, built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The TensorRT backend on doubles of TensorRT and CUDA: shift, first token, bans and candidates on its way."""
    bundle = load_bundle(built[name])
    own = own_bundle(bundle, tmp_path / "own")
    write_engines(own, FP32)
    machine = Machine(monkeypatch)
    backend = machine.backend(own, loop, cuda_graphs=False)
    model = load_model(open_checkpoint(bundle.folder, vocab_rows=bundle.manifest.vocab_rows))
    oracle = PyTorchBackend(model, bundle.manifest.merge, kv_cache=loop == "cached")
    prompt = _prompt(bundle)
    ranked = family_of(bundle.config).generation.rank_drawn
    settings = [{}, {"remasking": "entropy"}, *([{"top_k": None}, {"top_p": 0.9}, {"top_k": 60}] if ranked else [])]
    for each in settings:
        expected, found = (_answers(side, bundle, prompt, **each) for side in (oracle, backend))
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            assert np.array_equal(mine.tokens, other.tokens)
            np.testing.assert_allclose(mine.result.logits, other.result.logits, atol=1e-3)


def test_a_shifted_model_s_first_token_is_the_prompts(built: dict[str, Path]) -> None:
    bundle = load_bundle(built["lavida-dream"])
    prompt = _prompt(bundle)
    backend = OnnxRuntimeBackend(bundle, "cached", device="cpu")
    session = backend.start(prompt.embeddings, prompt.visual_positions)
    assert session.first_token is not None
    # It stands there from the first step on, and no step commits it.
    first = _answers(backend, bundle, prompt)[0]
    assert first.tokens[0, 0] == session.first_token[0]
    assert not first.transfer[0, 0]
