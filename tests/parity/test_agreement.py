"""Low precision against PyTorch in the same precision: right implementations pass, every injected fault is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PRECISIONS, PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Backend
from d3tom_export.loop.denoise import Floats, Ints, Session, StepRequest, StepResult
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.agreement import AgreementReport, Oracle, compare_in_step
from d3tom_export.parity.precision import in_int8
from d3tom_export.pipeline import Reader
from d3tom_export.prompt.samples import SAMPLES_FILE, Sample, load_samples, synthetic_samples
from tests.conftest import picture


@pytest.fixture(scope="module")
def half_oracle(half_bundle: Bundle) -> PyTorchBackend:
    oracle = PyTorchBackend(load_model(open_checkpoint(half_bundle.folder)).half(), half_bundle.manifest.merge)
    assert oracle.precision == "fp16"
    return oracle


def _length(sample: Sample) -> float:
    """Of its picture: the longest are shown in two tiles, and have the fewest visual tokens."""
    assert sample.picture is not None
    return max(sample.picture.size) / min(sample.picture.size)


def _compare(bundle: Bundle, oracle: Oracle, backend: Backend, samples: int) -> AgreementReport:
    manifest = bundle.manifest
    if (bundle.folder / SAMPLES_FILE).exists():
        questions = sorted(load_samples(bundle.folder / SAMPLES_FILE), key=_length, reverse=True)
    else:
        questions = [Sample("What is it?", picture(100, 60)), Sample("And this?", picture(30, 90, 1))]
    reader, pairs = Reader.of_bundle(bundle), [(oracle, backend)]
    return compare_in_step(pairs, bundle.config, reader, questions[:samples], manifest.generation, manifest.merge)


@pytest.fixture(scope="module")
def random_oracle(bundle: Bundle, eager_model: Lavida) -> PyTorchBackend:
    """Of a small random model, for what needs no trained one."""
    return PyTorchBackend(copy.deepcopy(eager_model).half(), bundle.manifest.merge)


@pytest.fixture(scope="module")
def short(half_bundle: Bundle) -> Bundle:
    """The bundle with answers in three steps, for what needs no more."""
    generation = half_bundle.manifest.generation.changed(steps=3)
    return replace(half_bundle, manifest=replace(half_bundle.manifest, generation=generation))


def test_fp16_graphs_agree_with_fp16_pytorch(half_bundle: Bundle, half_oracle: PyTorchBackend) -> None:
    """The stages as engines compute them, on ONNX Runtime."""
    report = _compare(half_bundle, half_oracle, OnnxRuntimeBackend(half_bundle, device="cpu"), 1)
    assert report.passed, report.lines()
    assert report.steps == 16
    assert report.true_flips == 0
    assert report.token_agreement >= report.token_agreement_needed >= 0.95
    assert 1e-6 < report.max_relative_logit_error < 0.02  # fp16's rounding, and not more
    assert report.max_relative_embedding_error < 0.01
    json = report.to_json()
    assert len(json["token_agreement_by_step"]) == 16
    assert "16 steps" in report.lines()[0]
    names = [bound["name"] for bound in json["bounds"]]
    assert {"logits, typical", "logits, worst", "kept sets", "prompt embeddings", "pictures embeddings"} <= {*names}
    asked = [bound for bound in json["bounds"] if "random prompts" not in bound["where"]]
    assert len(asked) < len(json["bounds"]) < 2 * len(asked)  # noise is judged too, by its own
    for bound in asked:  # bounded, and far below what a tensor of zeros would give
        assert bound["found"] <= bound["allowed"] < 0.2, bound


class _Split(nn.Linear):
    """A product in two parts, each rounded: as right as one, in another order."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2 + 3
        y = F.linear(x[..., :half], self.weight[:, :half]) + F.linear(x[..., half:], self.weight[:, half:])
        return y if self.bias is None else y + self.bias


def _in_parts(model: Lavida) -> Lavida:
    other = copy.deepcopy(model)
    for module in other.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Split
    return other


def _negate_head(model: Lavida) -> None:
    model.transformer.ff_out.weight.data.neg_()


def _drop_final_norm(model: Lavida) -> None:
    model.transformer.ln_f = nn.Identity()  # type: ignore[assignment]


def _zero_layers(model: Lavida) -> None:
    for block in model.transformer.blocks[len(model.transformer.blocks) // 2 :]:
        for parameter in block.parameters():
            parameter.data.zero_()


def _negate_projector(model: Lavida) -> None:
    for parameter in model.model.mm_projector.parameters():
        parameter.data.neg_()


def _shift_one_embedding(model: Lavida) -> None:
    model.transformer.wte.weight.data[7] *= 1.5


def _scale_keys(model: Lavida) -> None:
    """Attention at l* looks elsewhere, so that other tokens are kept."""
    model.transformer.blocks[2].k_proj.weight.data.neg_()


FAULTS = {
    "head negated": (_negate_head, "logits, typical"),
    "final norm dropped": (_drop_final_norm, "logits, typical"),
    "later layers zeroed": (_zero_layers, "logits, typical"),
    "projector negated": (_negate_projector, "pictures embeddings"),
    "an embedding off": (_shift_one_embedding, "table embeddings"),
    "keys at l* negated": (_scale_keys, "kept tokens differ (true flip"),
}
"""Those of the fidelity review, every one of which passed once, and what now names them."""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_right_rounding_passes_and_faults_do_not(half_bundle: Bundle, short: Bundle, precision: str) -> None:
    if precision != "fp16":  # one token in a hundred may be another, so it takes a few hundred
        short = half_bundle
    model = load_model(open_checkpoint(short.folder))
    if precision != "int8":
        model = model.to(PRECISIONS[precision])
    merge = short.manifest.merge
    kv_cache = precision == "bf16"  # both kinds of loop, without twice the time

    def run(other: Lavida) -> AgreementReport:
        backend = PyTorchBackend(other, merge, kv_cache=kv_cache)
        backend.precision = precision
        return _compare(short, PyTorchBackend(model, merge, kv_cache=kv_cache), backend, 1)

    right = in_int8(model) if precision == "int8" else _in_parts(model)
    report = run(right)
    assert report.passed, report.lines()
    assert report.max_abs_logit_error > 0
    for name, (fault, named) in FAULTS.items():
        faulty = copy.deepcopy(right)
        fault(faulty)
        report = run(faulty)
        assert not report.passed, name
        assert any(named in failure for failure in report.failures), (name, report.lines())
        assert report.to_json()["passed"] is False


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_other_rounding_passes_on_random_models(bundle: Bundle, eager_model: Lavida, precision: str) -> None:
    """Attention as sharp as random weights make it, in both kinds of loop."""
    model = copy.deepcopy(eager_model).to(PRECISIONS[precision])
    merge = bundle.manifest.merge
    pairs = [
        (PyTorchBackend(model, merge, kv_cache=cached), PyTorchBackend(_in_parts(model), merge, kv_cache=cached))
        for cached in (False, True)
    ]
    samples = [Sample("What is it?", picture(100, 60)), Sample("And this?", picture(30, 90, 1))]
    arguments = (bundle.config, Reader.of_bundle(bundle), samples, bundle.manifest.generation, merge)
    report = compare_in_step(pairs, *arguments)
    assert report.passed, report.lines()
    for bound in report.bounds:
        assert bound.allowed <= 0.5
    broken = copy.deepcopy(model)
    _negate_head(broken)
    assert not compare_in_step([(pairs[0][0], PyTorchBackend(broken, merge))], *arguments).passed


def test_bf16_pytorch_agrees_with_itself(bundle: Bundle, eager_model: Lavida) -> None:
    oracle = PyTorchBackend(copy.deepcopy(eager_model).to(torch.bfloat16), bundle.manifest.merge, kv_cache=True)
    report = _compare(bundle, oracle, oracle, 1)
    assert report.passed
    assert (report.precision, report.max_abs_logit_error, report.token_agreement) == ("bf16", 0.0, 1.0)
    assert report.tokens_identical
    assert report.transfers_identical
    assert all(bound.found == 0.0 for bound in report.bounds)


class _Changed(PyTorchBackend):
    """The oracle with its results changed."""

    change: Callable[[StepResult], StepResult]

    def start(self, prompt_embeddings: Floats, visual_positions: Ints, **more: Any) -> Session:  # type: ignore[override]
        session, change = super().start(prompt_embeddings, visual_positions, **more), self.change

        class Changed:
            first_token = session.first_token

            def step(self, request: StepRequest) -> StepResult:
                return change(session.step(request))

        return Changed()


def _other_kept(result: StepResult) -> StepResult:
    """The most important tokens of each row left out."""
    if result.kept is None or result.scores is None:
        return result
    keep = result.kept.shape[1]
    worst = np.argsort(result.scores, axis=1, kind="stable")[:, :keep]
    return replace(result, kept=np.sort(worst, axis=1))


def _fail(result: StepResult) -> StepResult:
    raise D3tomError("the engine stopped")


@pytest.mark.parametrize(
    ("change", "problem", "field"),
    [
        (lambda r: replace(r, logits=None), "no logits of shape", ""),
        (lambda r: replace(r, logits=r.logits * np.nan), "not finite", ""),
        (lambda r: replace(r, logits=r.logits[..., :-1]), "no logits of shape", ""),
        (lambda r: replace(r, kept=None), "only one side merged", "kept_identical"),
        (_other_kept, "kept tokens differ (true flip", "kept_identical"),
        (lambda r: replace(r, token=r.token + 1), "margin of other tokens", "tokens_identical"),
        (lambda r: replace(r, token=r.token[:, :-1]), "tokens and confidences of shape", ""),
        (lambda r: replace(r, confidence=r.confidence[:, :-1]), "tokens and confidences of shape", ""),
        (lambda r: replace(r, confidence=r.confidence * np.nan), "confidence", ""),
        (lambda r: replace(r, confidence=1.0 - r.confidence), "confidence", "transfers_identical"),
        (_fail, "step 0: the engine stopped", ""),
    ],
)
def test_departures_are_seen(
    bundle: Bundle,
    random_oracle: PyTorchBackend,
    change: Callable[[StepResult], StepResult],
    problem: str,
    field: str,
) -> None:
    changed = _Changed(random_oracle._model, bundle.manifest.merge)
    changed.change = change  # type: ignore[method-assign]
    report = _compare(bundle, random_oracle, changed, 1)
    assert any(problem in text for text in report.failures), report.lines()
    assert not report.passed
    if field:
        assert not report.to_json()[field]


def test_a_picture_that_becomes_nan_is_a_failure(
    bundle: Bundle, random_oracle: PyTorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps are given the oracle's embeddings; the backend's own are judged all the same, each of them."""
    backend = PyTorchBackend(random_oracle._model, bundle.manifest.merge)
    encode, shown = backend.encode_views, []

    def second_is_nan(pixel_values: Floats) -> Floats:
        shown.append(len(pixel_values))
        return encode(pixel_values) * (np.nan if len(shown) == 2 else 1.0)

    monkeypatch.setattr(backend, "encode_views", second_is_nan)
    report = _compare(bundle, random_oracle, backend, 2)
    assert len(shown) == 3  # views of noise, and two pictures
    assert report.problems == ["sample 0: embeddings of another shape, or not finite"]
    assert not report.passed
    assert report.to_json()["max_relative_embedding_error"] is None


def test_ties_of_scores_pass_and_are_counted(bundle: Bundle, random_oracle: PyTorchBackend) -> None:
    """Where all scores are equal, any kept set is as right as another."""
    tied = _Changed(random_oracle._model, bundle.manifest.merge)
    tied.change = lambda r: r if r.scores is None else replace(r, scores=np.ones_like(r.scores))  # type: ignore[method-assign]
    other = _Changed(random_oracle._model, bundle.manifest.merge)
    other.change = _other_kept  # type: ignore[method-assign]
    report = _compare(bundle, tied, other, 1)
    assert report.near_ties >= 3
    assert report.true_flips == 0
    assert not [problem for problem in report.problems if "kept" in problem]


def test_no_sample_is_no_proof(bundle: Bundle, random_oracle: PyTorchBackend) -> None:
    report = _compare(bundle, random_oracle, random_oracle, 0)
    assert not report.passed
    assert report.samples == 0
    assert report.problems == ["there was no sample to compare"]


def test_samples_of_tokens_serve_a_model_without_a_tokenizer(bundle: Bundle, eager_model: Lavida) -> None:
    model, merge = copy.deepcopy(eager_model).to(torch.bfloat16), MergeConfig(layer=1, ratio=0.7)
    blind = replace(bundle.config, vision=None)
    pair = PyTorchBackend(model, merge), PyTorchBackend(model, merge)
    samples = synthetic_samples(blind, 1)
    report = compare_in_step([pair], blind, None, samples, bundle.manifest.generation, merge)
    assert report.passed, report.lines()
