"""Stage `certainty`: margin and entropy of whole distributions without a vocabulary-wide tensor on the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.config import LOOPS, Certainty, CertaintyKind, Choices, GenerationConfig, LanguageConfig, Loop
from d3tom_export.engines.graph import engine_graph
from d3tom_export.errors import D3tomError
from d3tom_export.families.registry import read_config
from d3tom_export.loop.backend import Backend
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.loop.sampling import certainty_of, certainty_of_likeliest, certainty_of_logits, without_banned
from d3tom_export.model.lavida import Lavida
from d3tom_export.pipeline import run_loop
from d3tom_export.stages.certainty import CandidatesStage, CertaintyStage
from d3tom_export.stages.contract import CANDIDATES, CERTAINTY_OUTPUTS
from tests.backends.conftest import FP32
from tests.backends.fake_engines import Machine, own_bundle, write_engines
from tests.backends.test_tensorrt import ONE
from tests.conftest import raw_config

KINDS: tuple[CertaintyKind, ...] = ("margin", "entropy")
OUTPUTS = ("rest", "runner_up", "rest_entropy")


def _cases(rows: int) -> dict[str, np.ndarray]:
    """Logits (1, 4, rows) of every temper."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1, 4, rows))
    sharp = noise.copy()
    sharp[0, :, 3] = (15.0, 20.0, 25.0, 40.0)  # the others' share goes from 1e-6 down to nothing
    tied = 10 + noise
    tied[0, :, 5] = 20.0
    tied[0, :, 7] = (20.0, 20.0 - 2e-6, 20.0 - 1e-4, 20.0 - 1e-2)
    last = noise.copy()
    last[0, :, -1] = 9.0  # the largest is a padding row
    cases = {"noise": 4 * noise, "flat": 1e-4 * noise, "sharp": sharp, "tied": tied, "large": 3e4 + 100 * noise}
    return {name: logits.astype(np.float32) for name, logits in (cases | {"padding": last}).items()}


def _language(rows: int, banned: tuple[int, ...] = ()) -> LanguageConfig:
    """Of a model with a head of ``rows``."""
    raw = raw_config(vocab_size=rows, embedding_size=rows, mask_token_id=1)
    return replace(read_config(raw).language, banned_token_ids=banned)


def _stage(rows: int) -> CertaintyStage:
    return CertaintyStage(_language(rows))


def _outputs(logits: np.ndarray) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        return {
            name: value.numpy()
            for name, value in zip(OUTPUTS, _stage(logits.shape[-1])(torch.from_numpy(logits)), strict=True)
        }


def _certainty(kind: CertaintyKind, outputs: dict[str, np.ndarray]) -> np.ndarray:
    return certainty_of(Certainty(kind), *(outputs[name] for name in CERTAINTY_OUTPUTS[kind]))


@pytest.mark.parametrize("case", _cases(8))
@pytest.mark.parametrize("rows", [272, 126_464])
def test_it_gives_the_release_s_numbers(case: str, rows: int) -> None:
    logits = _cases(rows)[case]
    outputs = _outputs(logits)
    for kind in KINDS:
        found, expected = _certainty(kind, outputs), certainty_of_logits(Certainty(kind), logits)
        # What is told apart near certainty, where the margin nears 1 and the entropy 0, and near a tie.
        ends = (1 - found, 1 - expected) if kind == "margin" and case == "sharp" else (found, expected)
        np.testing.assert_allclose(*ends, rtol=2e-5, atol=1.2e-7 if kind == "margin" and case != "sharp" else 1e-14)


def test_it_tells_apart_what_float32_probabilities_cannot() -> None:
    logits = _cases(272)["sharp"][:, 1:]
    outputs = _outputs(logits)
    for kind in KINDS:
        found = _certainty(kind, outputs)[0]
        assert (np.diff(found) > 0).all()
    margins = _certainty("margin", outputs)[0]
    assert margins.astype(np.float32)[1] == margins.astype(np.float32)[2] == 1.0


def test_nothing_overflows_whatever_the_logits() -> None:
    logits = np.full((1, 3, 50), -3e38, dtype=np.float32)
    logits[0, 0, 4] = 3e38
    logits[0, 1] = 3e38
    outputs = _outputs(logits)
    assert all(np.isfinite(value).all() for value in outputs.values())
    np.testing.assert_allclose(_certainty("margin", outputs)[0], [1.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(_certainty("entropy", outputs)[0], [0.0, -np.log(50), -np.log(50)], atol=1e-5)


def test_the_graph_does_too_in_every_precision(bundle: Bundle) -> None:
    rows = bundle.config.language.head_rows
    spec, path = bundle.manifest.stages["certainty"], bundle.folder / stage_file("certainty")
    for precision in ("fp32", "fp16", "bf16"):
        graph = path.read_bytes() if precision == "fp32" else engine_graph(path, spec, precision, "onnx").model
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])  # no low precision in it: bf16 runs
        for case, logits in _cases(rows).items():
            found = dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"logits": logits}), strict=True))
            for name, expected in _outputs(logits).items():
                assert found[name].dtype == np.float32
                np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=1e-30, err_msg=f"{case} {name}")


def _answers(backend: Backend, bundle: Bundle, **settings: Any) -> list[StepRecord]:
    generation = GenerationConfig(gen_length=6, **settings)
    return list(run_loop(backend, ONE, 258, generation, bundle.manifest.merge))


def _agree(found: list[StepRecord], expected: list[StepRecord]) -> None:
    """Same tokens in the same order, and the same certainty where it was asked for."""
    for mine, other in zip(found, expected, strict=True):
        assert np.array_equal(mine.tokens, other.tokens)
        assert (mine.result.certainty is None) == (other.result.certainty is None)
        if mine.result.certainty is not None:
            np.testing.assert_allclose(
                mine.result.certainty, other.result.certainty, rtol=2e-4, atol=1e-4
            )  # near-ties are what logits leave


@pytest.mark.parametrize("loop", LOOPS)
def test_onnxruntime_ranks_by_it_and_brings_no_logits_to_the_host(
    bundle: Bundle, eager_model: Lavida, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = PyTorchBackend(eager_model, bundle.manifest.merge, kv_cache=loop == "cached")
    backend = OnnxRuntimeBackend(bundle, loop, device="cpu")
    widths, to_host = set(), ort.OrtValue.numpy

    def noted(value: ort.OrtValue) -> np.ndarray:
        array = to_host(value)
        widths.update(array.shape[-1:])
        return array

    monkeypatch.setattr(ort.OrtValue, "numpy", noted)
    rows = bundle.config.language.head_rows
    for settings in ({"remasking": "margin"}, {"remasking": "entropy"}, {"remasking": "random"}, {}):
        expected = _answers(oracle, bundle, **settings)
        widths.clear()
        _agree(_answers(backend, bundle, **settings), expected)
        assert rows not in widths
    _answers(backend, bundle, temperature=1.0)
    assert rows in widths


@pytest.mark.parametrize("loop", LOOPS)
def test_engines_rank_by_it_and_bring_no_logits_to_the_host(
    bundle: Bundle, eager_model: Lavida, loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle, rows = PyTorchBackend(eager_model, bundle.manifest.merge, kv_cache=loop == "cached"), 6
    own = own_bundle(bundle, tmp_path / "own")
    write_engines(own, FP32)
    machine = Machine(monkeypatch)
    backend = machine.backend(own, loop, cuda_graphs=False)
    for settings, per_row in (({}, 12), ({"remasking": "margin"}, 20), ({"remasking": "entropy"}, 20)):
        machine.device.copies.clear()
        found = _answers(backend, bundle, **settings)
        _agree(found, _answers(oracle, bundle, **settings))
        down = sum(size for way, size in machine.device.copies if way == "down")
        kept = sum(8 * (31 if loop == "cached" and not each.merged else each.keep) for each in found)
        kept -= 0 if loop == "cached" else 8 * found[0].keep  # the first step merges nothing
        assert down == len(found) * rows * per_row + kept
    assert machine.device.log.count("certainty") == 12


def test_a_backend_that_does_not_answer_is_refused(ort_backend: OnnxRuntimeBackend, bundle: Bundle) -> None:
    class Silent:
        def __init__(self, change: Any) -> None:
            self._change = change

        def __getattr__(self, name: str) -> Any:
            return getattr(ort_backend, name)

        def start(self, *arguments: Any, **more: Any) -> Any:
            session = ort_backend.start(*arguments, **more)
            step, change = session.step, self._change
            return SimpleNamespace(step=lambda request: replace(step(request), certainty=change), first_token=None)

    for certainty in (None, np.zeros((1, 5)), np.full((1, 6), np.nan)):
        says = (
            "that is not finite" if certainty is not None and certainty.shape == (1, 6) else "though it was asked for"
        )
        with pytest.raises(D3tomError, match=f"margin .*{says}"):
            _answers(Silent(certainty), bundle, remasking="margin")  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [case for case in _cases(8) if case != "padding"])
@pytest.mark.parametrize("settings", [(50, None), (7, None), (50, 0.6), (3, 0.95)])
def test_candidates_give_what_the_likeliest_say(case: str, settings: tuple[int, float | None]) -> None:
    logits = _cases(272)[case]
    with torch.inference_mode():
        likeliest, rest = (value.numpy() for value in CandidatesStage(_language(272))(torch.from_numpy(logits)))
    assert likeliest.shape == (1, 4, CANDIDATES)
    for kind in ("probability", *KINDS):
        certainty = Certainty(kind, *settings, single=True)  # type: ignore[arg-type]
        found, expected = certainty_of_likeliest(certainty, likeliest, rest), certainty_of_logits(certainty, logits)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=3e-7)


@pytest.mark.parametrize("stage", [CertaintyStage, CandidatesStage])
def test_banned_tokens_have_no_probability(stage: Any) -> None:
    logits = _cases(60)["noise"]
    banned = tuple(np.unique(logits.argmax(-1)).tolist())
    allowed = np.delete(logits, banned, axis=-1)
    with torch.inference_mode():
        found = stage(_language(60, banned))(torch.from_numpy(logits))
        expected = stage(_language(allowed.shape[-1]))(torch.from_numpy(allowed))
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), other.numpy(), rtol=1e-5)
    assert np.isneginf(without_banned(logits, Choices(60, banned))).sum() == 4 * len(banned)
