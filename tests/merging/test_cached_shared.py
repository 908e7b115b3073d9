"""The eager prefix that is prefilled alone and extended, against a plain restatement: one pass under a mask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Prompt
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.merging.cached import LayerCache, extend, prefill
from d3tom_export.model.lavida import Lavida
from d3tom_export.model.llada import LladaBlock, rotate
from d3tom_export.pipeline import run_loop
from tests.merging.test_cached_prefill import VISUAL, answer, shifted
from tests.merging.test_forward import MASK, prompts_of

PREFIX, ROWS = 26, 30
"""The last picture ends at 26 of 30 rows."""


def shared(model: Lavida, merge: MergeConfig, generation: GenerationConfig, prompt: Prompt) -> list[StepRecord]:
    backend = PyTorchBackend(model, merge, kv_cache=True)
    return list(run_loop(backend, prompt, MASK, generation, merge, logits=True, share_prefix=True))


def _row(block: LladaBlock, x: Tensor, at: int, seen: int, model: Lavida) -> Tensor:
    """One row's attention output (D): row ``at`` of ``x`` (L, D), which sees the first ``seen`` rows, head by head."""
    heads = block.project(block.attn_norm(x)[None])
    rotary = model.transformer.rotary(torch.arange(len(x)))
    queries, keys = rotate(heads.queries, rotary)[0], rotate(heads.keys, rotary)[0]
    group = block.n_heads // block.n_kv_heads
    mixed = []
    for head in range(block.n_heads):
        scores = keys[head // group, :seen] @ queries[head, at] / block.head_size**0.5
        mixed.append(torch.softmax(scores, dim=0) @ heads.values[0, head // group, :seen])
    return block.attn_out(torch.cat(mixed))


@torch.no_grad()
def masked(model: Lavida, prompt: Tensor, prefix: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """All layers' keys and values of one prompt (P, D) in a single pass, whose first ``prefix`` rows see themselves
    alone, and the rows after the last layer. Nothing is cached."""
    x, caches = prompt, []
    for block in model.transformer.blocks:
        heads = block.project(block.attn_norm(x)[None])
        caches.append((heads.keys[0], heads.values[0]))
        rows = [_row(block, x, at, prefix if at < prefix else len(x), model) for at in range(len(x))]
        x = block.feed_forward(x + torch.stack(rows))
    return caches, x


@torch.no_grad()
@pytest.mark.parametrize("prefix", [1, PREFIX, ROWS - 1])
def test_a_prefill_and_its_extension_are_one_pass_under_a_mask(eager_model: Lavida, prefix: int) -> None:
    model, prompts = shifted(eager_model), torch.from_numpy(prompts_of(2))
    cache, _ = prefill(model.transformer, prompts[:, :prefix])
    extended = extend(model.transformer, cache, prompts[:, prefix:])
    assert extended.logits is not None
    plain, _ = prefill(model.transformer, prompts)
    for row in range(2):
        wanted, x = masked(model, prompts[row], prefix)
        for layer, (found, (keys, values)) in enumerate(zip(extended.cache, wanted, strict=True)):
            torch.testing.assert_close(found.keys[row], keys, atol=2e-5, rtol=0)
            torch.testing.assert_close(found.values[row], values, atol=2e-5, rtol=0)
            if layer:  # the prefix has seen the question in the plain prefill
                assert (plain[layer].keys[row, :, :prefix] - keys[:, :prefix]).abs().max() > 1e-3
        torch.testing.assert_close(extended.logits[row], model.transformer.logits(x[-1:]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_each_layer_s_rest_follows_the_rows_that_its_prefix_has(eager_model: Lavida) -> None:
    """Prefixes of other lengths behind the second layer: the rest's positions are those behind them."""
    transformer, prompts = eager_model.transformer, torch.from_numpy(prompts_of(1))
    cache, _ = prefill(transformer, prompts[:, :PREFIX])
    short = [rows if layer < 2 else LayerCache(*(part[:, :, :9] for part in rows)) for layer, rows in enumerate(cache)]
    extended = extend(transformer, short, prompts[:, PREFIX:])
    x = prompts[:, PREFIX:]
    for block, before, after in zip(transformer.blocks, short, extended.cache, strict=True):
        rows = before.keys.shape[2]
        heads = block.project(block.attn_norm(x))
        torch.testing.assert_close(after.keys, torch.cat([before.keys, heads.keys], dim=2))
        here, there = (transformer.rotary(torch.arange(start, stop)) for start, stop in ((rows, rows + 4), (0, rows)))
        keys = torch.cat([rotate(before.keys, there), rotate(heads.keys, here)], dim=2)
        values = torch.cat([before.values, heads.values], dim=2)
        x = block.feed_forward(x + block.attend(rotate(heads.queries, here), keys, values))
    assert extended.logits is None


@pytest.mark.parametrize("merge_at", ["step", "prefill"])
def test_the_kept_set_of_a_merged_prefix_knows_no_question(eager_model: Lavida, merge_at: str) -> None:
    """Of two questions about the same pictures: the same at the prefill, where the masks follow the picture."""
    merge, generation = MergeConfig(1, 0.7, merge_at=merge_at), GenerationConfig(gen_length=4)  # type: ignore[arg-type]
    one, other = prompts_of(1), prompts_of(1)
    other[:, PREFIX:] = np.random.default_rng(9).normal(size=(1, ROWS - PREFIX, one.shape[2]))

    def kept(records: list[StepRecord]) -> list[list[list[int]]]:
        return [record.result.kept.tolist() for record in records if record.result.kept is not None]

    first, second = (kept(shared(eager_model, merge, generation, Prompt(each, VISUAL))) for each in (one, other))
    assert (first == second) is (merge_at == "prefill")
    first, second = (kept(answer(eager_model, merge, generation, each)) for each in (one, other))
    assert first != second


@pytest.mark.parametrize("merge_at", ["step", "prefill"])
def test_it_answers_otherwise_than_the_plain_loop_and_a_suffix_stands_behind(
    eager_model: Lavida, merge_at: str
) -> None:
    merge = MergeConfig(1, 0.7, merge_at=merge_at)  # type: ignore[arg-type]
    generation = GenerationConfig(gen_length=6, block_length=3, suffix_ids=(5, 9))
    ours = shared(eager_model, merge, generation, Prompt(prompts_of(3), VISUAL))
    plain = answer(eager_model, merge, generation, prompts_of(3))
    assert np.abs(ours[0].result.logits - plain[0].result.logits).max() > 1e-2  # type: ignore[operator]


@pytest.mark.parametrize("visual", [np.zeros(0, dtype=np.int64), np.arange(11, 30)], ids=["no picture", "no question"])
def test_a_prompt_with_nothing_to_share_runs_as_ever(eager_model: Lavida, visual: np.ndarray) -> None:
    merge, generation = MergeConfig(1, 0.7), GenerationConfig(gen_length=4)
    prompt = Prompt(prompts_of(2), visual)
    assert (prompt.prefix_tokens, prompt.shared_rows) == (30 if len(visual) else 0, 0)
    runs = shared(eager_model, merge, generation, prompt), answer(eager_model, merge, generation, prompts_of(2), visual)
    for one, other in zip(*runs, strict=True):
        np.testing.assert_array_equal(one.result.logits, other.result.logits)


def test_a_near_tie_of_a_shared_prefix_has_both_outcomes(eager_model: Lavida, monkeypatch: pytest.MonkeyPatch) -> None:
    merge, generation = MergeConfig(1, 0.7, merge_at="prefill"), GenerationConfig(gen_length=2)
    monkeypatch.setattr("d3tom_export.backends.pytorch.NEAR_TIE", 2.0)
    for record in shared(eager_model, merge, generation, Prompt(prompts_of(1), VISUAL)):
        assert len(record.result.alternative_logits) == 15
        for other in record.result.alternative_logits:
            assert other.shape == record.result.logits.shape  # type: ignore[union-attr]
            assert np.abs(other - record.result.logits).max() > 1e-4


def test_the_loop_without_a_cache_refuses_it(eager_model: Lavida) -> None:
    merge = MergeConfig(1, 0.7)
    backend, prompt = PyTorchBackend(eager_model, merge), Prompt(prompts_of(1), VISUAL)
    assert prompt.shared_rows == prompt.prefix_tokens == PREFIX
    with pytest.raises(D3tomError, match="in the loop with a KV cache alone"):
        run_loop(backend, prompt, MASK, GenerationConfig(gen_length=2), merge, share_prefix=True)
    assert replace(prompt, visual_positions=VISUAL[:4]).prefix_tokens == 7
