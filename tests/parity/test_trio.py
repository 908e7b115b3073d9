"""A prompt merged at its prefill in low precision: where the backend kept others, both sides begin again with them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import MergeConfig
from d3tom_export.loop.denoise import Floats, Ints, PromptMerge
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.agreement import AgreementReport, compare_in_step
from d3tom_export.prompt.samples import synthetic_samples

MERGE = MergeConfig(layer=1, ratio=0.7, merge_at="prefill")


@pytest.fixture(scope="module")
def model(eager_model: Lavida) -> Lavida:
    return copy.deepcopy(eager_model).to(torch.bfloat16)


class _OtherKept(PyTorchBackend):
    """The oracle, which at the prefill keeps the first tokens, whatever their scores."""

    def start(self, prompt_embeddings: Floats, visual_positions: Ints, **more: Any) -> Any:
        asked: PromptMerge | None = more.pop("prompt_merge")
        if asked is not None:
            scores = np.zeros((len(prompt_embeddings), len(visual_positions)), dtype=np.float32)
            scores[:, : asked.keep] = 1.0
            asked = replace(asked, selection_scores=scores)
        return super().start(prompt_embeddings, visual_positions, prompt_merge=asked, **more)


class _Tied(PyTorchBackend):
    """The oracle, to which all tokens are equally important; its logits are those of what it kept."""

    def start(self, *given: Any, **more: Any) -> Any:
        session = super().start(*given, **more)
        session._held = [held._replace(scores=torch.ones_like(held.scores)) for held in session._held]
        return session

    def witness(self, precision: str) -> PyTorchBackend:
        return _Tied(super().witness(precision)._model, self._merge, kv_cache=True, turns_closest=True)


def _compare(bundle: Bundle, oracle: PyTorchBackend, backend: PyTorchBackend) -> AgreementReport:
    blind = replace(bundle.config, vision=None)
    samples = synthetic_samples(blind, 2)
    return compare_in_step([(oracle, backend)], blind, None, samples, bundle.manifest.generation, MERGE)


def test_the_oracle_agrees_with_itself(bundle: Bundle, model: Lavida) -> None:
    oracle = PyTorchBackend(model, MERGE, kv_cache=True)
    report = _compare(bundle, oracle, oracle)
    assert report.passed, report.lines()
    assert (report.near_ties, report.true_flips, report.max_abs_logit_error) == (0, 0, 0.0)


def test_another_kept_set_is_judged_once_and_the_logits_compare_all_the_same(bundle: Bundle, model: Lavida) -> None:
    oracle, other = (kind(model, MERGE, kv_cache=True) for kind in (PyTorchBackend, _OtherKept))
    report = _compare(bundle, oracle, other)
    assert not report.kept_identical
    # Of each sample and of the probe with pictures, the first step alone.
    assert report.near_ties + report.true_flips == 3
    assert sum("step 0: kept tokens differ (true flip" in problem for problem in report.problems) == report.true_flips
    assert report.true_flips >= 1
    assert report.max_abs_logit_error == 0.0
    kept = [bound for bound in report.bounds if "kept" in bound.name]
    assert [bound.where for bound in kept] == ["with KV cache", "with KV cache, random prompts"]
    # The scores that were made up are compared with nobody's.
    assert all(bound.resolved is not None and bound.resolved < 0.9 for bound in kept)


def test_ties_of_scores_pass(bundle: Bundle, model: Lavida) -> None:
    report = _compare(bundle, _Tied(model, MERGE, kv_cache=True), _OtherKept(model, MERGE, kv_cache=True))
    assert (report.near_ties, report.true_flips, report.kept_identical) == (3, 0, True)
    assert report.max_abs_logit_error == 0.0
