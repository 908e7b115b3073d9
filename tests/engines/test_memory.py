"""Device memory on paper: LaViDa-8B must fit a 24 GiB card, and the figures follow from the tensors."""

from __future__ import annotations

import pytest

from d3tom_export.checkpoint.geometry import geometry_config
from d3tom_export.config import Loop, MergeConfig
from d3tom_export.cost.flops import layer_weights
from d3tom_export.engines.memory import GIB, answer_sizes, paper_memory

PROMPT, VISUAL, ANSWER = 1083, 1008, 64


@pytest.mark.parametrize("loop", ["uncached", "cached"])
def test_lavida_8b_in_bf16_fits_a_24_gib_card(loop: Loop) -> None:
    model, merge = geometry_config("lavida-8b"), MergeConfig(2, 0.9)
    memory = paper_memory(model, merge, loop, "bf16", answer_sizes(1, PROMPT, VISUAL, ANSWER))
    assert 15 * GIB < memory.weights < 16 * GIB  # every weight once
    assert memory.total <= 21 * GIB
    language = model.language
    token_by_token_and_for_attention = 4 * PROMPT * language.n_kv_heads * language.head_size * 2 * language.n_layers
    # Beside a prompt's, the rows of one step, which nobody reads.
    step = ANSWER * language.n_kv_heads * language.head_size * 2
    assert memory.cache == (token_by_token_and_for_attention if loop == "cached" else 0)
    assert memory.buffers > (step if loop == "cached" else 0)


def test_memory_grows_with_precision_batch_and_prompt() -> None:
    model, merge = geometry_config("lavida-2b"), MergeConfig(2, 0.9)

    def total(precision: str = "bf16", batch: int = 1, prompt: int = PROMPT) -> tuple[int, int]:
        memory = paper_memory(model, merge, "cached", precision, answer_sizes(batch, prompt, VISUAL, ANSWER))
        return memory.weights, memory.cache

    weights, cache = total()
    assert total("fp32") == (2 * weights, 2 * cache)
    assert total(batch=3) == (weights, 3 * cache)
    assert total(prompt=2 * PROMPT) == (weights, 2 * cache)


def test_a_prompt_merged_at_its_prefill_is_held_short_behind_the_layer() -> None:
    model, layer, kept = geometry_config("lavida-8b"), 2, 100
    sizes = answer_sizes(1, PROMPT, VISUAL, ANSWER)
    at_steps = paper_memory(model, MergeConfig(layer, 0.9), "cached", "bf16", sizes)
    merged = paper_memory(model, MergeConfig(layer, 0.9, merge_at="prefill"), "cached", "bf16", sizes)
    language = model.language
    row, later = 4 * language.n_kv_heads * language.head_size * 2, language.n_layers - layer - 1
    assert at_steps.cache - merged.cache == later * (VISUAL - kept) * row
    # `prompt_merge` holds layer l* once more.
    assert merged.weights - at_steps.weights == 2 * layer_weights(language)
    whole = paper_memory(model, MergeConfig(layer, 0.9, "none", merge_at="prefill"), "cached", "bf16", sizes)
    assert whole.cache == at_steps.cache
