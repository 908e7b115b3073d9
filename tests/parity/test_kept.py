"""Of two visual tokens with the same score either may be kept: the oracle goes along, and everything else compares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.config import GenerationConfig, MergeConfig, ModelConfig
from d3tom_export.loop.backend import Backend
from d3tom_export.loop.denoise import Session, StepRequest, StepResult
from d3tom_export.merging import forward
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity import kept
from d3tom_export.parity.validate import Report, validate_backends
from d3tom_export.prompt.samples import token_samples

MERGE = MergeConfig(layer=1, ratio=0.7)
GENERATION = GenerationConfig(gen_length=8)
WAYS = [
    pytest.param("uncached", MERGE, id="uncached"),
    pytest.param("cached", MERGE, id="cached"),
    pytest.param("cached", replace(MERGE, cache=replace(MERGE.cache, remerge="per-block")), id="held"),
    pytest.param("cached", replace(MERGE, merge_at="prefill"), id="prefill"),
]


class Otherwise:
    """A backend that keeps the best of the tokens that are not to be kept, in place of the last that is."""

    def __init__(self, backend: PyTorchBackend, change: Any = None) -> None:
        self._backend, self._change = backend, change
        self.name, self.precision = backend.name, backend.precision
        self.kv_cache, self.shares_prefix = backend.kv_cache, backend.shares_prefix
        self.image_newline = backend.image_newline
        self.embed_tokens, self.encode_views = backend.embed_tokens, backend.encode_views

    def start(self, *arguments: Any, **options: Any) -> Session:
        with _choosing_otherwise():
            session = self._backend.start(*arguments, **options)
        change = self._change

        class Otherwise:
            first_token = session.first_token

            def step(self, request: StepRequest) -> StepResult:
                with _choosing_otherwise():
                    result = session.step(request)
                return result if change is None else change(result)

        return Otherwise()


@contextmanager
def _choosing_otherwise() -> Iterator[None]:
    def second_best(scores: Tensor, keep: int) -> Tensor:
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        chosen = torch.cat([order[:, : keep - 1], order[:, keep : keep + 1]], dim=1)
        return (order[:, :keep] if keep == scores.shape[1] else chosen).sort(dim=-1).values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "most_important", second_best)
        yield


def _validated(model: Lavida, loop: str, merge: MergeConfig, change: Any = None) -> Report:
    config: ModelConfig = model.config
    oracle = PyTorchBackend(model, merge, kv_cache=loop == "cached")
    other: Backend = Otherwise(oracle, change)
    return validate_backends([(oracle, other)], config, None, token_samples(config, 2), GENERATION, merge)


@pytest.mark.parametrize(("loop", "merge"), WAYS)
def test_a_token_of_another_score_is_a_flip(eager_model: Lavida, loop: str, merge: MergeConfig) -> None:
    report = _validated(eager_model, loop, merge)
    assert not report.passed
    assert not report.kept_identical
    assert report.true_flips > 0
    assert report.near_tied_selections == 0


@pytest.mark.parametrize(("loop", "merge"), WAYS)
def test_one_of_the_same_score_is_gone_along_with(
    eager_model: Lavida, loop: str, merge: MergeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "NEAR_TIE", 2.0)  # as if all scores were the same
    report = _validated(eager_model, loop, merge)
    assert report.passed, report.lines()
    assert report.near_tied_selections > 0
    assert report.max_abs_logit_error < 1e-5
    assert "another token whose score was as good" in "\n".join(report.lines())


@pytest.mark.parametrize(("loop", "merge"), WAYS)
def test_what_else_departs_is_seen_all_the_same(
    eager_model: Lavida, loop: str, merge: MergeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(result: StepResult) -> StepResult:
        assert result.logits is not None
        logits = result.logits.copy()
        logits[..., 0] += 0.01
        return replace(result, logits=logits)

    monkeypatch.setattr(kept, "NEAR_TIE", 2.0)
    report = _validated(eager_model, loop, merge, change)
    assert not report.passed
    assert report.kept_identical
    assert report.max_abs_logit_error > 1e-3
