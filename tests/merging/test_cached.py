"""The eager loop with a KV cache: against a masked plain pass, its merge, and its options beyond the release."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.config import CacheMergeConfig, GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.merging.cached import MergedCache, forward_cached, merge_cache, prefill
from d3tom_export.merging.forward import Merging
from d3tom_export.merging.merge import nearest_kept
from d3tom_export.model.lavida import Lavida
from tests.merging.test_forward import prompts_of, run_eager


@torch.no_grad()
def test_cached_without_merging_attends_to_prompt_and_answer(eager_model: Lavida) -> None:
    """An independent statement of prefix mode: one pass under a mask that hides the answer from the prompt."""
    prompt, answer = torch.randn(2, 12, 32), torch.randn(2, 5, 32)
    cached = forward_cached(eager_model.transformer, prefill(eager_model.transformer, prompt).cache, answer)[0]
    x = torch.cat([prompt, answer], dim=1)
    mask = torch.ones(17, 17, dtype=torch.bool)
    mask[:12, 12:] = False
    rotary = eager_model.transformer.compact_rotary(x)
    for block in eager_model.transformer.blocks:
        x = block(x, rotary, mask)
    torch.testing.assert_close(cached.logits, eager_model.transformer.logits(x[:, 12:]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_merged_cache_restores_the_mean_norm(eager_model: Lavida) -> None:
    cache = prefill(eager_model.transformer, torch.randn(2, 12, 32)).cache[2]
    positions = torch.tensor([[0, 1, 5, 8, 11], [0, 2, 5, 9, 11]])
    target = nearest_kept(cache.keys.mean(dim=1), positions)
    merged, sums = merge_cache(cache, target, positions), merge_cache(cache, target, positions, restore_norm=False)
    for stored, rows, unscaled in zip(cache, merged, sums, strict=True):
        assert rows.shape == (2, 2, 5, 8)
        for row in range(2):
            mean_norm = stored[row][:, positions[row]].norm(dim=-1).mean()
            torch.testing.assert_close(rows[row].norm(dim=-1), mean_norm.expand(2, 5))
            for slot in range(5):
                members = stored[row][:, target[row] == slot].sum(dim=1)
                torch.testing.assert_close(unscaled[row][:, slot], members, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"select": "fastv"}, {"aggregate": "mean"}, {"positions": "original"}])
def test_the_cached_loop_merges_as_released_only(eager_model: Lavida, options: dict) -> None:
    with pytest.raises(D3tomError, match="compact positions only"):
        PyTorchBackend(eager_model, MergeConfig(1, 0.5, **options), kv_cache=True)


def _cached(model: Lavida, cache: CacheMergeConfig, generation: GenerationConfig, **merge: object) -> list[StepRecord]:
    config = MergeConfig(1, **{"ratio": 0.7, "cache": cache} | merge)  # type: ignore[arg-type]
    return run_eager(model, prompts_of(1), config.in_loop(True), generation, kv_cache=True)


def test_a_cached_merge_that_keeps_everything_changes_nothing(eager_model: Lavida) -> None:
    """The release returns the cache as it is where no token is dropped: no norm is restored either."""
    generation = GenerationConfig(gen_length=4)
    merged = _cached(eager_model, CacheMergeConfig(), generation, ratio=0.0)[1].result
    assert merged.kept.tolist() == [list(range(20))]
    plain = _cached(eager_model, CacheMergeConfig(), generation, schedule="none")[1].result
    assert plain.kept is None
    np.testing.assert_array_equal(merged.logits, plain.logits)


def test_the_cached_ratio_is_fixed_unless_asked_otherwise(eager_model: Lavida) -> None:
    generation = GenerationConfig(gen_length=6)
    fixed = [record.keep for record in _cached(eager_model, CacheMergeConfig(), generation)]
    adaptive = [record.keep for record in _cached(eager_model, CacheMergeConfig(adaptive=True), generation)]
    assert fixed == [20, 6, 6, 6, 6, 6]
    assert adaptive == [20, 1, 3, 6, 8, 10]  # truncated in double precision, as released


def test_one_visual_token_stays_where_the_release_merges_all_into_text(eager_model: Lavida) -> None:
    """At ratio 0.99 int(20 * 0.01) is 0. The released cached merge then keeps the text alone; we keep one (E3, E4)."""
    _, merged, *_ = _cached(
        eager_model, CacheMergeConfig(), GenerationConfig(gen_length=4), ratio=0.99, schedule="fixed"
    )
    assert merged.keep == 1
    assert merged.result.kept.shape == (1, 1)
    transformer = eager_model.transformer
    with torch.no_grad():
        cache = prefill(transformer, torch.from_numpy(prompts_of(1))).cache
        text = torch.tensor([[*range(3), *range(23, 30)]])
        caches = [merge_cache(layer, nearest_kept(layer.keys.mean(dim=1), text), text) for layer in cache[2:]]
        held = MergedCache(1, caches, torch.zeros(1, 20), torch.zeros(1, 0, dtype=torch.int64), ())
        answer = torch.full((1, 4), 258)
        first, *_ = _cached(eager_model, CacheMergeConfig(), GenerationConfig(gen_length=4), schedule="none")
        answer[torch.from_numpy(first.transfer)] = torch.from_numpy(first.tokens[first.transfer])
        released, _ = forward_cached(transformer, cache, transformer.wte(answer), held=held)
    assert np.abs(merged.result.logits - released.logits.numpy()).max() > 1e-2


@pytest.mark.parametrize("option", [{"restore_norm": False}, {"text_targets": False}, {"remerge": "per-block"}])
def test_cached_options_beyond_the_release_change_the_answer(eager_model: Lavida, option: dict) -> None:
    generation = GenerationConfig(gen_length=4)
    released = _cached(eager_model, CacheMergeConfig(), generation)
    other = _cached(eager_model, CacheMergeConfig(**option), generation)
    assert any(np.abs(a.result.logits - b.result.logits).max() > 1e-3 for a, b in zip(released, other, strict=True))


def test_a_cache_merged_per_block_holds_its_choice_for_the_block(eager_model: Lavida) -> None:
    generation = GenerationConfig(gen_length=12, block_length=4)
    held = _cached(eager_model, CacheMergeConfig(remerge="per-block", adaptive=True), generation)
    kept = [None if record.result.kept is None else record.result.kept[0].tolist() for record in held]
    assert kept[0] is None
    for block in (kept[1:4], kept[4:8], kept[8:12]):
        assert all(choice == block[0] for choice in block)
    assert [record.keep for record in held] == [20, 3, 3, 3, *[1] * 8]  # alpha restarts at 1 with every block
    every = _cached(eager_model, CacheMergeConfig(), generation)
    assert len({tuple(record.result.kept[0]) for record in every[1:4]}) > 1


def test_merging_on_change_is_merging_at_every_step(eager_model: Lavida) -> None:
    generation = GenerationConfig(gen_length=6)
    every = _cached(eager_model, CacheMergeConfig(), generation)
    on_change = _cached(eager_model, CacheMergeConfig(remerge="on-change"), generation)
    for a, b in zip(every, on_change, strict=True):
        np.testing.assert_array_equal(a.result.logits, b.result.logits)


@torch.no_grad()
def test_without_text_targets_no_text_row_changes(eager_model: Lavida) -> None:
    cache = prefill(eager_model.transformer, torch.randn(1, 24, 32)).cache
    answer, deciders = torch.randn(1, 4, 32), torch.ones(1, 4, dtype=torch.bool)
    for text_targets in (True, False):
        options = CacheMergeConfig(restore_norm=False, text_targets=text_targets)
        config = MergeConfig(0, 0.8, cache=options)
        _, merged = forward_cached(
            eager_model.transformer, cache, answer, Merging(config, deciders, torch.arange(4, 20), 3)
        )
        assert merged is not None
        same = [torch.equal(merged.caches[0].values[:, :, slot], cache[1].values[:, :, slot]) for slot in range(4)]
        assert all(same) is not text_targets
