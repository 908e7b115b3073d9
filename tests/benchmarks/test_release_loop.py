"""The release-style loop does what our loop does, by other means: the baseline of every speed-up must be right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.release_loop import ReleaseLoop
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.config import LOOPS, CacheMergeConfig, GenerationConfig, MergeConfig
from d3tom_export.cost.bench import random_prompt
from d3tom_export.cost.combinations import Combination, combinations_of
from d3tom_export.errors import D3tomError
from d3tom_export.model.lavida import Lavida
from d3tom_export.pipeline import run_loop

MERGE = MergeConfig(layer=1, ratio=0.7)
GENERATION = GenerationConfig(16, block_length=8, schedule="shift")  # two blocks: deciders carry over the border


@pytest.mark.parametrize("combination", combinations_of(LOOPS), ids=lambda combination: combination.label)
@pytest.mark.parametrize("schedule", ["adaptive", "fixed"])
def test_it_gives_what_our_pytorch_backend_gives(eager_model: Lavida, combination: Combination, schedule: str) -> None:
    """Grouped queries, two blocks, K from 1 upwards."""
    merge = combination.merge(replace(MERGE, schedule=schedule))  # type: ignore[arg-type]
    cached = combination.loop == "cached"
    prompt = random_prompt(eager_model.config.language, text_tokens=10, visual_tokens=40)
    mask_token_id = eager_model.config.language.mask_token_id
    backend = PyTorchBackend(eager_model, MERGE, kv_cache=cached)
    ours = list(run_loop(backend, prompt, mask_token_id, GENERATION, merge, logits=True))
    theirs = list(ReleaseLoop(eager_model, MERGE.layer, kv_cache=cached).answer(prompt, GENERATION, merge, logits=True))
    assert len(ours) == len(theirs) == 16
    assert any(record.merged for record in ours) == combination.merged
    for our, their in zip(ours, theirs, strict=True):
        assert (their.block, their.step, their.keep, their.merged) == (our.block, our.step, our.keep, our.merged)
        np.testing.assert_array_equal(their.tokens, our.tokens)
        np.testing.assert_array_equal(their.transfer, our.transfer)
        if our.merged:
            np.testing.assert_array_equal(their.result.kept, our.result.kept)
        assert our.result.logits is not None
        assert their.result.logits is not None
        np.testing.assert_allclose(their.result.logits, our.result.logits, rtol=0, atol=1e-4)
        np.testing.assert_allclose(
            np.where(our.transfer, their.result.confidence, 0),
            np.where(our.transfer, our.result.confidence, 0),
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("generation", "merge"),
    [
        (GenerationConfig(8, temperature=0.5), MERGE),
        (GenerationConfig(8), replace(MERGE, cache=CacheMergeConfig(remerge="per-block"))),
    ],
)
def test_it_refuses_what_it_does_not_do(eager_model: Lavida, generation: GenerationConfig, merge: MergeConfig) -> None:
    prompt = random_prompt(eager_model.config.language, text_tokens=5, visual_tokens=8)
    with pytest.raises(D3tomError, match="release-style loop"):
        next(ReleaseLoop(eager_model, 1, kv_cache=True).answer(prompt, generation, merge))
