"""The eager merged forward pass: edges, batches, and the KV-cache variant against the plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.denoise import StepRecord, denoise
from d3tom_export.errors import D3tomError
from d3tom_export.merging.cached import forward_cached, merge_cache, prefill
from d3tom_export.merging.forward import Merging, forward, surviving_positions
from d3tom_export.merging.merge import assignment_margin, nearest_kept, runner_up_assignment
from d3tom_export.model.lavida import Lavida

MASK = 258


def _records(
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


def _prompts(batch: int, seed: int = 0) -> np.ndarray:
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
    prompts = _prompts(3)
    batched = _records(eager_model, prompts, merge, generation, kv_cache)
    for row in range(3):
        alone_settings = settings | {"seed": settings.get("seed", 0) + row}
        alone = _records(
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
    last = _records(eager_model, _prompts(3), MergeConfig(1, 0.7), GenerationConfig(gen_length=8))[-1]
    assert not np.array_equal(last.tokens[0], last.tokens[1])
    assert not np.array_equal(last.result.kept[0], last.result.kept[1])


def test_sampling_repeats_with_its_seed_and_changes_with_it(eager_model: Lavida) -> None:
    def tokens(seed: int) -> list[int]:
        generation = GenerationConfig(gen_length=8, temperature=1.0, seed=seed)
        return _records(eager_model, _prompts(1), MergeConfig(1, 0.7), generation)[-1].tokens[0].tolist()

    assert tokens(0) == tokens(0)
    assert tokens(0) != tokens(1)


def test_two_runs_of_visual_tokens_merge_as_one_set(eager_model: Lavida) -> None:
    """Several pictures in a prompt: the positions need not be contiguous."""
    visual = np.concatenate([np.arange(2, 8), np.arange(12, 20)])
    records = _records(
        eager_model, _prompts(1), MergeConfig(1, 0.5, "fixed"), GenerationConfig(gen_length=4), visual=visual
    )
    assert [record.keep for record in records] == [14, 7, 7, 7]
    assert records[-1].result.kept.max() < 14


@pytest.mark.parametrize("select", ["decider", "random", "uniform", "fastv"])
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_every_policy_keeps_as_many_as_it_should(eager_model: Lavida, select: str, aggregate: str) -> None:
    merge = MergeConfig(2, 0.6, "fixed", select, aggregate)  # type: ignore[arg-type]
    records = _records(eager_model, _prompts(2), merge, GenerationConfig(gen_length=4))
    assert all(record.result.kept.shape == (2, 8) for record in records[1:])


def test_policies_differ(eager_model: Lavida) -> None:
    kept = {
        select: tuple(
            _records(eager_model, _prompts(1), MergeConfig(2, 0.6, "fixed", select), GenerationConfig(gen_length=4))[1]
            .result.kept[0]
            .tolist()
        )
        for select in ("decider", "random", "uniform", "fastv")
    }
    assert len(set(kept.values())) == 4


def test_options_beyond_the_release_change_the_answer(eager_model: Lavida) -> None:
    def logits(**options: str) -> np.ndarray:
        merge = MergeConfig(1, 0.7, **options)  # type: ignore[arg-type]
        return _records(eager_model, _prompts(1), merge, GenerationConfig(gen_length=4))[1].result.logits

    released = logits()
    for options in ({"aggregate": "mean"}, {"positions": "original"}, {"select": "uniform"}):
        assert np.abs(logits(**options) - released).max() > 1e-3, options


@torch.no_grad()
def test_cached_without_merging_attends_to_prompt_and_answer(eager_model: Lavida) -> None:
    """An independent statement of prefix mode: one pass under a mask that hides the answer from the prompt."""
    prompt, answer = torch.randn(2, 12, 32), torch.randn(2, 5, 32)
    cached = forward_cached(eager_model.transformer, prefill(eager_model.transformer, prompt), answer, None)
    x = torch.cat([prompt, answer], dim=1)
    mask = torch.ones(17, 17, dtype=torch.bool)
    mask[:12, 12:] = False
    rotary = eager_model.transformer.compact_rotary(x)
    for block in eager_model.transformer.blocks:
        x = block(x, rotary, mask)
    torch.testing.assert_close(cached.logits, eager_model.transformer.logits(x[:, 12:]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_merged_cache_restores_the_mean_norm(eager_model: Lavida) -> None:
    cache = prefill(eager_model.transformer, torch.randn(2, 12, 32))[2]
    positions = torch.tensor([[0, 1, 5, 8, 11], [0, 2, 5, 9, 11]])
    merged = merge_cache(cache, positions)
    for stored, rows in zip(cache, merged, strict=True):
        assert rows.shape == (2, 2, 5, 8)
        for row in range(2):
            mean_norm = stored[row][:, positions[row]].norm(dim=-1).mean()
            torch.testing.assert_close(rows[row].norm(dim=-1), mean_norm.expand(2, 5))


@pytest.mark.parametrize("options", [{"select": "fastv"}, {"aggregate": "mean"}, {"positions": "original"}])
def test_the_cached_loop_merges_as_released_only(eager_model: Lavida, options: dict) -> None:
    with pytest.raises(D3tomError, match="merges as released only"):
        PyTorchBackend(eager_model, MergeConfig(1, 0.5, **options), kv_cache=True)


def test_a_cached_merge_that_keeps_everything_still_equalises_norms(eager_model: Lavida) -> None:
    """K = V is no no-op with a cache: every row takes the mean norm (algorithm.md, "With a KV cache")."""
    generation, keep_all = GenerationConfig(gen_length=4), MergeConfig(1, 0.0, "fixed")
    merged = _records(eager_model, _prompts(1), keep_all, generation, kv_cache=True)[1].result
    assert merged.kept.tolist() == [list(range(20))]
    plain = _records(eager_model, _prompts(1), MergeConfig(1, 0.0, "none"), generation, kv_cache=True)[1].result
    assert plain.kept is None
    assert np.abs(merged.logits - plain.logits).max() > 1e-3


def test_the_margin_tells_how_closely_a_merge_was_decided() -> None:
    normed = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 2.0]]])
    margin = assignment_margin(normed, torch.tensor([[0, 1]]))
    assert margin.item() == pytest.approx(0.2)  # token 2 is 0.8 and 0.6 away from the two; token 3 is certain
    assert assignment_margin(normed, torch.tensor([[0]])).item() == float("inf")
    twins = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]])
    assert assignment_margin(twins, torch.tensor([[0, 1]])).item() == 0.0


def test_the_runner_up_differs_in_the_closest_call_only() -> None:
    normed = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 2.0]]])
    kept = torch.tensor([[0, 1]])
    assert nearest_kept(normed, kept).tolist() == [[0, 1, 1, 1]]
    assert runner_up_assignment(normed, kept).tolist() == [[0, 1, 0, 1]]
