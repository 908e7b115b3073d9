"""The eager merged forward pass: edges, batches, policies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.loop.denoise import StepRecord, denoise
from d3tom_export.merging.forward import Merging, forward, surviving_positions
from d3tom_export.model.lavida import Lavida

MASK = 258


def run_eager(
    model: Lavida,
    prompts: np.ndarray,
    merge: MergeConfig,
    generation: GenerationConfig,
    kv_cache: bool = False,
    visual: np.ndarray | None = None,
) -> list[StepRecord]:
    positions = np.arange(3, 23) if visual is None else visual
    session = PyTorchBackend(model, merge, kv_cache=kv_cache).start(prompts, positions)
    return list(
        denoise(
            session,
            batch=len(prompts),
            visual_tokens=len(positions),
            mask_token_id=MASK,
            generation=generation,
            merge=merge,
            logits=True,
        )
    )


def prompts_of(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, 30, 32)).astype(np.float32)


def test_survivors_are_text_and_kept_visual_tokens_in_order() -> None:
    positions = surviving_positions(9, torch.tensor([2, 3, 4, 6]), torch.tensor([[0, 3], [1, 2]]))
    assert positions.tolist() == [[0, 1, 2, 5, 6, 7, 8], [0, 1, 3, 4, 5, 7, 8]]


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_keeping_everything_is_the_plain_model(eager_model: Lavida, layer: int) -> None:
    embeddings = torch.randn(2, 20, 32)
    deciders = torch.ones(2, 5, dtype=torch.bool)
    merging = Merging(MergeConfig(layer, 0.5), deciders, torch.arange(2, 12), keep=10)
    merged = forward(eager_model.transformer, embeddings, 5, merging)
    plain = forward(eager_model.transformer, embeddings, 5, None)
    torch.testing.assert_close(merged.logits, plain.logits, atol=1e-5, rtol=0)
    assert merged.kept.tolist() == [list(range(10))] * 2


BATCH_CASES = [
    (MergeConfig(1, 0.7), {}, False),
    (MergeConfig(1, 0.7, "fixed"), {"block_length": 4, "step_ratio": 0.5}, False),
    (MergeConfig(1, 0.7), {"temperature": 0.8, "seed": 11}, False),
    (MergeConfig(1, 0.7), {"remasking": "random", "seed": 4}, False),
    (MergeConfig(1, 0.7, select="random"), {"seed": 2}, False),
    (MergeConfig(1, 0.7, "fixed"), {}, True),
]


@pytest.mark.parametrize(("merge", "settings", "kv_cache"), BATCH_CASES)
def test_rows_of_a_batch_do_not_depend_on_one_another(
    eager_model: Lavida, merge: MergeConfig, settings: dict, kv_cache: bool
) -> None:
    generation = GenerationConfig(gen_length=8, **settings)
    prompts = prompts_of(3)
    batched = run_eager(eager_model, prompts, merge, generation, kv_cache)
    for row in range(3):
        alone_settings = settings | {"seed": settings.get("seed", 0) + row}
        alone = run_eager(
            eager_model, prompts[row : row + 1], merge, GenerationConfig(gen_length=8, **alone_settings), kv_cache
        )
        for one, many in zip(alone, batched, strict=True):
            assert np.array_equal(one.tokens[0], many.tokens[row])
            assert np.array_equal(one.transfer[0], many.transfer[row])
            if one.merged:
                assert np.array_equal(one.result.kept[0], many.result.kept[row])
            np.testing.assert_allclose(one.result.logits[0], many.result.logits[row], atol=1e-4)


def test_rows_do_choose_differently(eager_model: Lavida) -> None:
    """Guards the test above: equal rows would pass it whatever the code did."""
    last = run_eager(eager_model, prompts_of(3), MergeConfig(1, 0.7), GenerationConfig(gen_length=8))[-1]
    assert not np.array_equal(last.tokens[0], last.tokens[1])
    assert not np.array_equal(last.result.kept[0], last.result.kept[1])


def test_sampling_repeats_with_its_seed_and_changes_with_it(eager_model: Lavida) -> None:
    def tokens(seed: int) -> list[int]:
        generation = GenerationConfig(gen_length=8, temperature=1.0, seed=seed)
        return run_eager(eager_model, prompts_of(1), MergeConfig(1, 0.7), generation)[-1].tokens[0].tolist()

    assert tokens(0) == tokens(0)
    assert tokens(0) != tokens(1)


def test_two_runs_of_visual_tokens_merge_as_one_set(eager_model: Lavida) -> None:
    """Several pictures in a prompt: the positions need not be contiguous."""
    visual = np.concatenate([np.arange(2, 8), np.arange(12, 20)])
    records = run_eager(
        eager_model, prompts_of(1), MergeConfig(1, 0.5, "fixed"), GenerationConfig(gen_length=4), visual=visual
    )
    assert [record.keep for record in records] == [14, 7, 7, 7]
    assert records[-1].result.kept.max() < 14


@pytest.mark.parametrize("select", ["decider", "random", "uniform", "fastv"])
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_every_policy_keeps_as_many_as_it_should(eager_model: Lavida, select: str, aggregate: str) -> None:
    merge = MergeConfig(2, 0.6, "fixed", select, aggregate)  # type: ignore[arg-type]
    records = run_eager(eager_model, prompts_of(2), merge, GenerationConfig(gen_length=4))
    assert all(record.result.kept.shape == (2, 8) for record in records[1:])


def test_policies_differ(eager_model: Lavida) -> None:
    kept = {
        select: tuple(
            run_eager(eager_model, prompts_of(1), MergeConfig(2, 0.6, "fixed", select), GenerationConfig(gen_length=4))[
                1
            ]
            .result.kept[0]
            .tolist()
        )
        for select in ("decider", "random", "uniform", "fastv")
    }
    assert len(set(kept.values())) == 4


def test_options_beyond_the_release_change_the_answer(eager_model: Lavida) -> None:
    def logits(**options: str) -> np.ndarray:
        merge = MergeConfig(1, 0.7, **options)  # type: ignore[arg-type]
        return run_eager(eager_model, prompts_of(1), merge, GenerationConfig(gen_length=4))[1].result.logits

    released = logits()
    for options in ({"aggregate": "mean"}, {"positions": "original"}, {"select": "uniform"}):
        assert np.abs(logits(**options) - released).max() > 1e-3, options
