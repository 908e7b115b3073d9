"""Low precision against PyTorch in the same precision: really run in fp16, and every kind of departure seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from d3tom_export.agreement import ROUNDING, AgreementReport, compare_in_step
from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle import Bundle
from d3tom_export.checkpoint import load_model, open_checkpoint
from d3tom_export.denoise import Floats, Ints, Session, StepRequest, StepResult
from d3tom_export.errors import D3tomError
from d3tom_export.pipeline import Backend, Reader
from d3tom_export.samples import SAMPLES_FILE, load_samples


@pytest.fixture(scope="module")
def half_oracle(half_bundle: Bundle) -> PyTorchBackend:
    oracle = PyTorchBackend(load_model(open_checkpoint(half_bundle.folder)).half(), half_bundle.manifest.merge)
    assert oracle.precision == "fp16"
    return oracle


def _compare(
    half_bundle: Bundle, oracle: Backend, backend: Backend, samples: int, tie_tolerance: float = 0.0
) -> AgreementReport:
    manifest = half_bundle.manifest
    questions = load_samples(half_bundle.folder / SAMPLES_FILE)[:samples]
    reader = Reader.of_bundle(half_bundle)
    pairs = [(oracle, backend)]
    return compare_in_step(
        *(pairs, half_bundle.config, reader, questions, manifest.generation, manifest.merge),
        tie_tolerance=tie_tolerance,
    )


def test_fp16_graphs_agree_with_fp16_pytorch(half_bundle: Bundle, half_oracle: PyTorchBackend) -> None:
    """The stages as engines compute them, on ONNX Runtime. Kept sets part at most where scores lie within rounding."""
    backend = OnnxRuntimeBackend(half_bundle, device="cpu")
    report = _compare(half_bundle, half_oracle, backend, 4)
    assert report.steps == 4 * 16
    assert report.passed == (report.near_ties == 0), report.lines()
    assert report.true_flips == 0
    assert report.near_ties <= 4
    assert report.max_kept_gap <= ROUNDING["fp16"]
    tolerant = _compare(half_bundle, half_oracle, backend, 4, report.max_kept_gap)
    assert tolerant.passed
    assert tolerant.ties == report.near_ties
    assert report.token_agreement > 0.99
    assert 1e-6 < report.max_relative_logit_error < 0.02  # fp16's rounding, and not more
    assert report.max_relative_embedding_error < 0.01
    json = tolerant.to_json()
    assert json["kept_identical"]
    assert len(json["token_agreement_by_step"]) == 16
    assert "64 steps" in report.lines()[0]


def test_bf16_pytorch_agrees_with_itself(half_bundle: Bundle) -> None:
    model = load_model(open_checkpoint(half_bundle.folder)).to(torch.bfloat16)
    for kv_cache in (False, True):
        oracle = PyTorchBackend(model, half_bundle.manifest.merge, kv_cache=kv_cache)
        report = _compare(half_bundle, oracle, oracle, 1)
        assert report.passed
        assert (report.precision, report.max_abs_logit_error, report.token_agreement) == ("bf16", 0.0, 1.0)
        assert report.tokens_identical
        assert report.transfers_identical


class _Changed(PyTorchBackend):
    """The oracle with its results changed."""

    change: Callable[[StepResult], StepResult]

    def start(self, prompt_embeddings: Floats, visual_positions: Ints, *, merges: bool = True) -> Session:  # type: ignore[override]
        session, change = super().start(prompt_embeddings, visual_positions, merges=merges), self.change

        class Changed:
            def step(self, request: StepRequest) -> StepResult:
                return change(session.step(request))

        return Changed()


def _other_kept(result: StepResult) -> StepResult:
    if result.kept is None:
        return result
    left_out = np.setdiff1d(np.arange(result.kept[0, -1] + 2), result.kept[0])[:1]
    return replace(result, kept=np.sort(np.concatenate([result.kept[:, 1:], left_out[None]], axis=1), axis=1))


def _fail(result: StepResult) -> StepResult:
    raise D3tomError("the engine stopped")


@pytest.mark.parametrize(
    ("change", "problem", "field"),
    [
        (lambda r: replace(r, logits=None), "no logits of shape", ""),
        (lambda r: replace(r, logits=r.logits * np.nan), "not finite", ""),
        (lambda r: replace(r, kept=None), "only one side merged", "kept_identical"),
        (_other_kept, "kept tokens differ (true flip", "kept_identical"),
        (lambda r: replace(r, token=r.token + 1), "", "tokens_identical"),
        (lambda r: replace(r, confidence=1.0 - r.confidence), "", "transfers_identical"),
        (_fail, "step 0: the engine stopped", ""),
    ],
)
def test_departures_are_seen(
    half_bundle: Bundle,
    half_oracle: PyTorchBackend,
    change: Callable[[StepResult], StepResult],
    problem: str,
    field: str,
) -> None:
    changed = _Changed(half_oracle._model, half_bundle.manifest.merge)
    changed.change = change  # type: ignore[method-assign]
    report = _compare(half_bundle, half_oracle, changed, 1)
    assert any(problem in text for text in report.problems) if problem else report.passed
    assert report.passed == (not problem)
    if field:
        assert not report.to_json()[field]


def test_a_picture_that_becomes_nan_is_a_failure(
    half_bundle: Bundle, half_oracle: PyTorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps are given the oracle's embeddings; the backend's own are judged all the same, each of them."""
    backend = PyTorchBackend(half_oracle._model, half_bundle.manifest.merge)
    encode, shown = backend.encode_views, []

    def first_is_nan(pixel_values: Floats) -> Floats:
        shown.append(len(pixel_values))
        return encode(pixel_values) * (np.nan if len(shown) == 1 else 1.0)

    monkeypatch.setattr(backend, "encode_views", first_is_nan)
    report = _compare(half_bundle, half_oracle, backend, 2)
    assert len(shown) == 2
    assert report.problems == ["sample 0: embeddings of another shape, or not finite"]
    assert not report.passed
    assert report.to_json()["max_relative_embedding_error"] is None


def test_int8_passes_by_its_tokens(half_bundle: Bundle) -> None:
    """Other kept sets do not fail it, tokens do."""
    model = load_model(open_checkpoint(half_bundle.folder))
    oracle = PyTorchBackend(model, half_bundle.manifest.merge)
    for change, passes in ((_other_kept, True), (lambda r: replace(r, token=r.token + 1), False)):
        backend = _Changed(model, half_bundle.manifest.merge)
        backend.precision = "int8"
        backend.change = change  # type: ignore[method-assign]
        report = _compare(half_bundle, oracle, backend, 1)
        assert report.passed == passes, report.lines()
        assert report.kept_identical != passes
        assert report.problems == []


def test_exact_ties_pass_and_are_counted(half_bundle: Bundle, half_oracle: PyTorchBackend) -> None:
    """Where all scores are equal, any kept set is as right as another."""
    tied = _Changed(half_oracle._model, half_bundle.manifest.merge)
    tied.change = lambda r: r if r.scores is None else replace(r, scores=np.ones_like(r.scores))  # type: ignore[method-assign]
    other = _Changed(half_oracle._model, half_bundle.manifest.merge)
    other.change = _other_kept  # type: ignore[method-assign]
    report = _compare(half_bundle, tied, other, 1)
    assert report.passed
    assert report.ties == 15
