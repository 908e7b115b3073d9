"""The cost model against torch's counter on the eager oracle, exactly, and the figures the documentation quotes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d3tom_export.config import CacheMergeConfig, GenerationConfig, LanguageConfig, MergeConfig
from d3tom_export.cost.flops import (
    Cost,
    PromptPlan,
    StepMerge,
    Workload,
    answer_cost,
    cache_bytes_per_token,
    cached_stages,
    cached_step,
    layer_weights,
    merged_prefill,
    merged_prefill_stages,
    prefill,
    prompt_plan,
    rotate,
    step_merges,
    uncached_stages,
    uncached_step,
)
from d3tom_export.errors import D3tomError
from d3tom_export.families.registry import read_config
from d3tom_export.loop.denoise import StepRequest, StepResult, denoise
from d3tom_export.merging import cached as oracle_cached
from d3tom_export.merging.forward import Merging, forward
from d3tom_export.model.llada import Transformer
from d3tom_export.stages.cached import loop_modules as cached_modules
from d3tom_export.stages.uncached import loop_modules as uncached_modules
from tests.conftest import raw_config

WORK = Workload(prompt_tokens=23, visual_tokens=12, answer_tokens=5, batch=2)
LAST = 3  # l* of the last layer of raw_config's four


@pytest.fixture(
    scope="module", params=[(4, False), (2, True), (1, False)], ids=["plain", "grouped-bias", "multi-query"]
)
def transformer(request: pytest.FixtureRequest) -> Transformer:
    """Small models with 4 query heads and 4, 2 or 1 key/value heads. Weights do not matter to a count."""
    heads, bias = request.param
    raw = raw_config(n_kv_heads=heads, include_qkv_bias=bias)
    return Transformer(read_config(raw).language).eval()


def counted(run: Callable[[], Any]) -> int:
    """FLOPs torch counts. Its plain attention is asked for: the CPU's fused kernel is not in the counter's table."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def embeddings(tokens: int) -> torch.Tensor:
    return torch.randn(WORK.batch, tokens, 32, generator=torch.Generator().manual_seed(tokens))


def merging(layer: int, keep: int | None) -> Merging | None:
    if keep is None:
        return None
    deciders = torch.ones(WORK.batch, WORK.answer_tokens, dtype=torch.bool)
    visual = torch.arange(4, 4 + WORK.visual_tokens)
    return Merging(MergeConfig(layer, 0.5), deciders, visual, keep)


MERGES = [(0, None), (0, 5), (1, 1), (1, 5), (2, WORK.visual_tokens), (LAST, 5)]


@pytest.mark.parametrize(("layer", "keep"), MERGES)
def test_an_uncached_step_is_what_torch_counts(transformer: Transformer, layer: int, keep: int | None) -> None:
    cost = uncached_step(transformer.config, WORK, layer, keep, whole_last_layer=True)
    sequence = embeddings(WORK.tokens)
    measured = counted(lambda: forward(transformer, sequence, WORK.answer_tokens, merging(layer, keep)))
    assert measured == cost.flops


def test_the_prefill_is_what_torch_counts(transformer: Transformer) -> None:
    config = transformer.config
    measured = counted(lambda: oracle_cached.prefill(transformer, embeddings(WORK.prompt_tokens)))
    assert measured == prefill(config, WORK, whole_last_layer=True).flops
    # What the last layer's keys and values do without: queries, attention, output and feed-forward.
    rows, width = WORK.batch * WORK.prompt_tokens, config.d_model
    spared = 4 * rows * width**2 + 4 * rows * WORK.prompt_tokens * width + 6 * rows * width * config.mlp_hidden_size
    assert measured == prefill(config, WORK).flops + spared


def oracle_cached_cost(config: LanguageConfig, layer: int, keep: int | None) -> int:
    """FLOPs of the eager cached step that merges afresh; it scores from a product of its own, the stages reuse one."""
    return cached_step(config, WORK, layer, keep, recomputes_importance=True).flops


@pytest.mark.parametrize(("layer", "keep"), MERGES)
def test_a_cached_step_is_what_torch_counts(transformer: Transformer, layer: int, keep: int | None) -> None:
    config = transformer.config
    with torch.no_grad():
        cache = oracle_cached.prefill(transformer, embeddings(WORK.prompt_tokens)).cache
    answer = embeddings(WORK.answer_tokens)
    afresh = counted(lambda: oracle_cached.forward_cached(transformer, cache, answer, merging(layer, keep)))
    assert afresh == oracle_cached_cost(config, layer, keep)

    if keep is not None:
        with torch.no_grad():
            _, held = oracle_cached.forward_cached(transformer, cache, answer, merging(layer, keep))
        reuse = counted(lambda: oracle_cached.forward_cached(transformer, cache, answer, held=held))
        assert reuse == cached_step(config, WORK, layer, keep, merges_afresh=False).flops


def parts(stages: dict[str, Cost]) -> dict[str, int]:
    return {name: cost.flops for name, cost in stages.items()}


@pytest.mark.parametrize(("layer", "keep"), [(0, 5), (1, 5), (LAST, 5)])
def test_an_uncached_step_by_stage_is_what_torch_counts(transformer: Transformer, layer: int, keep: int) -> None:
    """The exported modules themselves. The counter does not look into the merge node, so its search is added."""
    modules = uncached_modules(transformer, MergeConfig(layer, 0.5))
    prompt, answer = embeddings(WORK.prompt_tokens), embeddings(WORK.answer_tokens)
    deciders = torch.ones(WORK.batch, WORK.answer_tokens, dtype=torch.bool)
    visual = torch.arange(4, 4 + WORK.visual_tokens)
    outputs: dict[str, Any] = {}

    def run(name: str, *inputs: torch.Tensor) -> int:
        return counted(lambda: outputs.update({name: modules[name](*inputs)}))

    measured = {"embed": 0, "front": run("front", prompt, answer)}
    measured["merge"] = run("merge", outputs["front"], deciders, visual, torch.tensor([keep]))
    measured["back"] = run("back", outputs["merge"][0], torch.tensor([WORK.answer_tokens]))
    stages = uncached_stages(transformer.config, WORK, layer, keep)
    assert measured == parts(stages | {"merge": replace(stages["merge"], search=0)})


@pytest.mark.parametrize(("layer", "keep"), [(0, 5), (1, 5), (LAST, 5)])
def test_a_cached_step_by_stage_is_what_torch_counts(transformer: Transformer, layer: int, keep: int) -> None:
    """The exported modules, whose scores cost no product of their own."""
    config, modules = transformer.config, cached_modules(transformer, MergeConfig(layer, 0.5))
    deciders = torch.ones(WORK.batch, WORK.answer_tokens, dtype=torch.bool)
    visual = torch.arange(4, 4 + WORK.visual_tokens)
    outputs: dict[str, Any] = {}

    def run(name: str, *inputs: torch.Tensor) -> int:
        return counted(lambda: outputs.update({name: modules[name](*inputs)}))

    assert run("prefill", embeddings(WORK.prompt_tokens)) == prefill(config, WORK).flops
    rows = outputs["prefill"]
    with torch.no_grad():
        caches = [modules["rotate"](*rows[index : index + 2]) for index in range(0, len(rows), 2)]
    assert counted(lambda: modules["rotate"](*rows[:2])) == rotate(config, WORK).flops == 0
    flat = [tensor for pair in caches for tensor in pair]
    later, at_layer = 2 * (layer + 1), caches[layer]
    front = run("front", embeddings(WORK.answer_tokens), *flat[: 2 * layer])
    inputs = (outputs["front"], deciders, visual, torch.tensor([keep]), *at_layer)
    decide, merge = run("decide", *inputs), run("merge", *inputs, *rows[later:])
    back = run("back", outputs["merge"][0], *outputs["merge"][2:])
    unmerged = run("back", outputs["decide"][0], *flat[later:])

    afresh = cached_stages(config, WORK, layer, keep)
    outside_the_node = replace(afresh["merge"], search=0)
    assert {"embed": 0, "front": front, "merge": merge, "back": back} == parts(afresh | {"merge": outside_the_node})
    held = cached_stages(config, WORK, layer, keep, merges_afresh=False)
    assert {"embed": 0, "front": front, "decide": decide, "back": back} == parts(held)
    plain = cached_stages(config, WORK, layer, None)
    assert {"embed": 0, "front": front, "decide": decide, "back": unmerged} == parts(plain)


def test_weights_are_the_model_s(transformer: Transformer) -> None:
    config = transformer.config
    assert layer_weights(config) == sum(weight.numel() for weight in transformer.blocks[0].parameters())
    everything = sum(weight.numel() for weight in transformer.parameters())
    spared_embeddings = (config.vocab_rows - WORK.answer_tokens) * config.d_model
    for cost in (uncached_step(config, WORK, 1, 5), cached_step(config, WORK, 1, 5)):
        assert cost.weights_read == 4 * (everything - spared_embeddings)
    last = transformer.blocks[-1]
    unread = (last.q_proj, last.attn_out, last.ff_norm, last.ff_proj, last.up_proj, last.ff_out)
    unread_size = sum(weight.numel() for module in unread for weight in module.parameters())
    assert prefill(config, WORK).weights_read == 4 * (config.n_layers * layer_weights(config) - unread_size)


def test_cache_bytes_are_those_of_the_oracle_s_cache(transformer: Transformer) -> None:
    config, layer, keep = transformer.config, 1, 5
    with torch.no_grad():
        cache = oracle_cached.prefill(transformer, embeddings(WORK.prompt_tokens)).cache
        answer = embeddings(WORK.answer_tokens)
        _, merged = oracle_cached.forward_cached(transformer, cache, answer, merging(layer, keep))
    assert merged is not None

    def size(layers: list[oracle_cached.LayerCache]) -> int:
        return sum(part.nbytes for pair in layers for part in pair)

    whole, earlier, later, short = size(cache), size(cache[: layer + 1]), size(cache[layer + 1 :]), size(merged.caches)
    assert prefill(config, WORK).cache_written == whole
    assert whole == WORK.batch * WORK.prompt_tokens * cache_bytes_per_token(config, 4)
    plain, afresh = cached_step(config, WORK, layer, None), cached_step(config, WORK, layer, keep)
    reused = cached_step(config, WORK, layer, keep, merges_afresh=False)
    assert (plain.cache_read, plain.cache_written) == (whole, 0)
    assert (afresh.cache_read, afresh.cache_written) == (earlier + later + short, short)
    assert (reused.cache_read, reused.cache_written) == (earlier + short, 0)
    assert uncached_step(config, WORK, layer, keep).bytes == plain.weights_read


class _Recorder:
    """A session that notes what it is asked and answers anything."""

    first_token = None

    def __init__(self) -> None:
        self.asked: list[StepMerge] = []

    def step(self, request: StepRequest) -> StepResult:
        self.asked.append(StepMerge(request.keep, request.cache_merge != "held") if request.merge else StepMerge(None))
        return StepResult(np.zeros_like(request.answer_ids), np.ones(request.answer_ids.shape), None)


@pytest.mark.parametrize("settings", [{}, {"step_ratio": 0.5}, {"block_length": 4, "schedule": "shift"}])
@pytest.mark.parametrize(("schedule", "ratio"), [("adaptive", 0.8), ("adaptive", 0.3), ("fixed", 0.9), ("none", 0.5)])
@pytest.mark.parametrize("remerge", ["every-step", "on-change", "per-block"])
@pytest.mark.parametrize("visual_tokens", [0, 50])
@pytest.mark.parametrize("merge_at", ["step", "prefill"])
def test_step_merges_are_those_of_the_denoising_loop(
    settings: dict[str, Any], schedule: Any, ratio: float, remerge: Any, visual_tokens: int, merge_at: Any
) -> None:
    generation = GenerationConfig(gen_length=12, **settings)
    merge = MergeConfig(1, ratio, schedule, cache=CacheMergeConfig(remerge=remerge), merge_at=merge_at)
    merge = merge.in_loop(True) if merge_at == "prefill" else merge
    recorder = _Recorder()
    list(denoise(recorder, batch=1, visual_tokens=visual_tokens, mask_token_id=9, generation=generation, merge=merge))
    assert step_merges(merge, generation, visual_tokens) == recorder.asked


def test_a_merged_prefill_is_what_torch_counts(transformer: Transformer) -> None:
    """The eager oracle, with and without mask rows that score, at every layer but the last."""
    config, prompt, masks = transformer.config, embeddings(WORK.prompt_tokens), embeddings(WORK.answer_tokens)
    for layer in range(LAST):
        merge = merging(layer, 5)
        assert merge is not None
        for scored in (True, False):
            scores = None if scored else torch.rand(WORK.batch, WORK.visual_tokens)
            given = merge._replace(selection_scores=scores)

            def run(given: Merging = given) -> None:
                oracle_cached.prefill_merged(transformer, oracle_cached.score_prompt(transformer, prompt, masks, given))

            cost = merged_prefill(
                config, WORK, layer, 5, scored=scored, whole_last_layer=True, recomputes_importance=True
            )
            assert counted(run) == cost.flops
    with pytest.raises(D3tomError, match="0 visual tokens cannot be kept"):
        merged_prefill(config, WORK, 1, 0)
    with pytest.raises(D3tomError, match="no layer behind it would read"):
        merged_prefill(config, WORK, LAST, 5)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("shift", [False, True])
def test_a_merged_prefill_by_stage_is_what_torch_counts(transformer: Transformer, layer: int, shift: bool) -> None:
    """The exported modules; the counter does not look into the merge node, so its search is left out."""
    config, keep = replace(transformer.config, row_shift=shift), 5
    model = copy.deepcopy(transformer)
    model.config = config
    modules = cached_modules(model, MergeConfig(layer, 0.5, merge_at="prefill"))
    outputs: dict[str, Any] = {}

    def run(name: str, *inputs: torch.Tensor) -> int:
        return counted(lambda: outputs.update({name: modules[name](*inputs)}))

    measured = {"prompt_front": run("prompt_front", embeddings(WORK.prompt_tokens)), "rotate": 0, "embed": 0}
    hidden, *rows = outputs["prompt_front"]
    with torch.no_grad():
        caches = [modules["rotate"](*rows[index : index + 2]) for index in range(0, len(rows), 2)]
    flat = [tensor for pair in caches for tensor in pair]
    visual, deciders = torch.arange(4, 4 + WORK.visual_tokens), torch.ones(WORK.batch, WORK.answer_tokens).bool()
    measured["front"] = run("front", embeddings(WORK.answer_tokens), *flat[:-2])
    measured["decide"] = run("decide", outputs["front"], deciders, visual, torch.tensor([keep]), *flat[-2:])
    measured["prompt_merge"] = run("prompt_merge", hidden, visual, outputs["decide"][1])
    measured["prompt_back"] = run("prompt_back", outputs["prompt_merge"])
    stages = merged_prefill_stages(config, WORK, layer, keep)
    assert list(stages) == list(measured)
    assert measured == parts(stages | {"prompt_merge": replace(stages["prompt_merge"], search=0)})

    def size(tensors: Sequence[torch.Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    later = outputs["prompt_back"][: 2 * (LAST - layer)]
    assert stages["prompt_front"].cache_written == size(rows)
    assert stages["prompt_back"].cache_written == size(later)
    assert stages["rotate"].cache_read == stages["rotate"].cache_written == size(rows) + size(later)


def test_a_prompt_merged_at_its_prefill_is_part_of_the_answer(transformer: Transformer) -> None:
    config, generation = transformer.config, GenerationConfig(gen_length=WORK.answer_tokens)
    merge = MergeConfig(1, 0.5, merge_at="prefill").in_loop(True)
    plan = prompt_plan(merge, WORK.visual_tokens)
    assert plan == PromptPlan(6, scored=True)
    assert prompt_plan(replace(merge, select="uniform"), WORK.visual_tokens) == PromptPlan(6, scored=False)
    for unmerged in (replace(merge, ratio=0.0), replace(merge, schedule="none"), replace(merge, merge_at="step")):
        assert prompt_plan(unmerged, WORK.visual_tokens) == PromptPlan()
    steps = step_merges(merge, generation, WORK.visual_tokens)
    held = cached_step(config, WORK, 1, 6, merges_afresh=False)
    answer = answer_cost(config, WORK, 1, steps, cached=True, prompt=plan)
    assert answer == sum([held] * WORK.answer_tokens, merged_prefill(config, WORK, 1, 6))


def test_an_answer_is_the_sum_of_its_steps(transformer: Transformer) -> None:
    config = transformer.config
    steps = [StepMerge(None), StepMerge(5), StepMerge(5, afresh=False)]
    uncached = answer_cost(config, WORK, 1, steps, cached=False)
    assert uncached == uncached_step(config, WORK, 1, None) + sum([uncached_step(config, WORK, 1, 5)] * 2, Cost())
    cached = answer_cost(config, WORK, 1, steps, cached=True)
    reused = cached_step(config, WORK, 1, 5, merges_afresh=False)
    step = cached_step(config, WORK, 1, 5)
    parts = [prefill(config, WORK), rotate(config, WORK), cached_step(config, WORK, 1, None), step, reused]
    assert cached.flops == sum(part.flops for part in parts)
    assert cached.bytes == sum(part.bytes for part in parts)


def test_refuses_sizes_that_cannot_be(transformer: Transformer) -> None:
    with pytest.raises(D3tomError, match="no more visual tokens than prompt"):
        Workload(prompt_tokens=4, visual_tokens=5, answer_tokens=1)
    with pytest.raises(D3tomError, match="0 visual tokens cannot be kept"):
        cached_step(transformer.config, WORK, 1, 0)
    with pytest.raises(D3tomError, match="it has 4 layers"):
        uncached_step(transformer.config, WORK, 4, None)


# LaViDa-LLaDA-8B (lavida.md A4, A5) with a picture of 1008 visual tokens among a prompt of 1083 (E6).
LAVIDA_8B = read_config(
    raw_config(
        d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288, vocab_size=126464,
        embedding_size=126464, mask_token_id=126336, mm_vision_tower=None, vision_config=None,
    ),
    vocab_rows=126349,
).language  # fmt: skip


def lavida_work(answer_tokens: int) -> Workload:
    return Workload(1083, 1008, answer_tokens, bytes_per_element=2)


def test_what_the_cache_weighs_in_a_cached_step_of_the_8b_model() -> None:
    assert cache_bytes_per_token(LAVIDA_8B, 2) == 524_288
    plain = cached_step(LAVIDA_8B, lavida_work(64), 3, None)
    assert round(plain.attention / plain.flops, 4) == 0.0386
    assert round(plain.cache_read / plain.bytes, 4) == 0.0365


@pytest.mark.parametrize(
    ("batch", "cache_share", "afresh_bytes", "held_bytes"), [(1, 0.036, 1.010, 0.973), (32, 0.548, 1.155, 0.598)]
)
def test_when_merging_pays_with_a_cache(batch: int, cache_share: float, afresh_bytes: float, held_bytes: float) -> None:
    """Keeping 100 of 1008: 3 % fewer FLOPs; more bytes where the cache is merged at every step, fewer where held."""
    work = Workload(1083, 1008, 64, batch, bytes_per_element=2)
    plain, afresh = cached_step(LAVIDA_8B, work, 3, None), cached_step(LAVIDA_8B, work, 3, 100)
    held = cached_step(LAVIDA_8B, work, 3, 100, merges_afresh=False)
    assert (round(afresh.flops / plain.flops, 4), round(held.flops / plain.flops, 4)) == (0.9747, 0.9733)
    assert round(plain.cache_read / plain.bytes, 3) == cache_share
    assert (round(afresh.bytes / plain.bytes, 3), round(held.bytes / plain.bytes, 3)) == (afresh_bytes, held_bytes)


def released_flops(work: Workload, keep: int | None) -> int:
    """FLOPs of an uncached step of 8B as E6 counts the release, from ours (lavida.md E2, E6).

    The last layer and the head are on every row that reaches them, importance has all L rows of attention, the search
    is left out (0.02 %).
    """
    cost, width = uncached_step(LAVIDA_8B, work, 3, keep, whole_last_layer=True), LAVIDA_8B.d_model
    head = 2 * (work.tokens - work.merged_away(keep)) * width * LAVIDA_8B.head_rows
    importance = 0 if keep is None else 2 * work.tokens**2 * width
    return cost.projections + cost.attention + cost.feed_forward + head + importance


@pytest.mark.parametrize(("ratio", "saved"), [(0.8, 62.1), (0.9, 69.7)])
def test_flops_saved_by_the_released_loop_with_the_adaptive_ratio(ratio: float, saved: float) -> None:
    """docs/flops.md, beside our own loop's 61.2 and 68.6 %."""
    work = Workload(1083, 1008, 64, bytes_per_element=2)
    generation = GenerationConfig(gen_length=64, step_ratio=0.5, schedule="shift")
    steps = step_merges(MergeConfig(3, ratio), generation, 1008)
    merged = sum(released_flops(work, step.keep) for step in steps)
    assert round(100 * (1 - merged / (len(steps) * released_flops(work, None))), 1) == saved


@pytest.mark.parametrize(
    ("answer_tokens", "steps", "ratio", "released", "ours"),
    [
        (128, 64, 0.8, 59.9, 58.8),
        (128, 64, 0.9, 67.2, 65.9),
        (128, 64, 0.5, 37.8, 37.1),
        (32, 16, 0.8, 61.8, 61.1),
        (32, 16, 0.9, 69.3, 68.5),
        (32, 16, 0.5, 39.0, 38.5),
    ],
)
def test_flops_saved_by_merging_without_a_cache(
    answer_tokens: int, steps: int, ratio: float, released: float, ours: float
) -> None:
    """lavida.md E6 to its last printed digit, with a fixed ratio and l* = 3.

    Our loop saves a smaller share: its last layer and head are on the answer's rows alone, merged or not.
    """
    work = lavida_work(answer_tokens)
    generation = GenerationConfig(answer_tokens, step_ratio=0.5)
    merges = step_merges(MergeConfig(3, ratio, "fixed"), generation, work.visual_tokens)
    assert len(merges) == steps
    base = steps * released_flops(work, None)
    assert round(100 * (1 - sum(released_flops(work, step.keep) for step in merges) / base), 1) == released
    plain = answer_cost(LAVIDA_8B, work, 3, [StepMerge(None)] * steps, cached=False)
    merged = answer_cost(LAVIDA_8B, work, 3, merges, cached=False)
    assert round(100 * (1 - merged.flops / plain.flops), 1) == ours


@pytest.mark.parametrize(("answer_tokens", "steps", "released", "ours"), [(128, 64, 8.4, 7.8), (32, 16, 11.2, 10.9)])
def test_flops_saved_by_the_cache_alone(answer_tokens: int, steps: int, released: float, ours: float) -> None:
    """lavida.md E6 gives 8.4x and "11x" for the release, whose prefill runs its last layer and the head to the end."""
    work = lavida_work(answer_tokens)
    unmerged = [StepMerge(None)] * steps
    cached = answer_cost(LAVIDA_8B, work, 3, unmerged, cached=True).flops
    uncached = answer_cost(LAVIDA_8B, work, 3, unmerged, cached=False).flops
    assert round(uncached / cached, 1) == ours
    spared = prefill(LAVIDA_8B, work, whole_last_layer=True).flops - prefill(LAVIDA_8B, work).flops
    spared += 2 * work.prompt_tokens * LAVIDA_8B.d_model * LAVIDA_8B.head_rows
    assert round(steps * released_flops(work, None) / (cached + spared), 1) == released
