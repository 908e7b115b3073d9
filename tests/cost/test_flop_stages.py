"""Stages' shares of an answer, the vision tower against torch's counter, and the paper's figure 5."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d3tom_export.checkpoint.folder import default_generation
from d3tom_export.checkpoint.geometry import geometry_config
from d3tom_export.checkpoint.tensors import product_shapes
from d3tom_export.config import QUANT_FORMATS, CacheMergeConfig, GenerationConfig, MergeConfig, QuantFormat
from d3tom_export.cost.flop_stages import answer_stages, prompt_stages, reductions, vision_stage
from d3tom_export.cost.flops import (
    Cost,
    StepMerge,
    Workload,
    answer_cost,
    cached_step,
    prompt_plan,
    step_merges,
    uncached_step,
)
from d3tom_export.errors import D3tomError
from d3tom_export.families.registry import read_config
from d3tom_export.model.lavida import Lavida
from d3tom_export.quantize.plan import QuantizeRequest, plan_of, stored_bytes
from tests.conftest import raw_config

MODEL = read_config(raw_config())
WORK = Workload(prompt_tokens=23, visual_tokens=12, answer_tokens=8, batch=2)
GENERATION = GenerationConfig(8, block_length=4)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("name", ["synthetic", "lavida-tiny"])
def test_the_vision_tower_is_what_torch_counts(name: str, views: int) -> None:
    """To the last FLOP and byte: patches, tower and projector; pooling and norms are no matrix products."""
    config = MODEL if name == "synthetic" else geometry_config(name)
    assert config.vision is not None
    model = Lavida(config).eval()
    pixels = torch.zeros(views, 3, config.vision.image_size, config.vision.image_size)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode_views(pixels)
    cost = vision_stage(config, views)
    assert cost.flops == counter.get_total_flops()
    weights = [*model.model.vision_tower.parameters(), *model.model.mm_projector.parameters()]
    assert cost.weights_read == sum(weight.nbytes for weight in weights)


def test_the_tower_s_layers_may_be_others_than_released() -> None:
    assert MODEL.vision is not None
    fewer, released = vision_stage(MODEL, 1, layers=1), vision_stage(MODEL, 1)
    assert vision_stage(MODEL, 1, layers=MODEL.vision.num_hidden_layers - 1) == released
    assert fewer.attention * (MODEL.vision.num_hidden_layers - 1) == released.attention
    assert (fewer.patches, fewer.projector) == (released.patches, released.projector)


def test_a_prompt_is_its_views_and_its_text() -> None:
    vision, embed = prompt_stages(MODEL, WORK, views=3)
    assert vision.cost == vision_stage(MODEL, 6)  # of both prompts of the batch, in one call
    assert (embed.stage, embed.calls, embed.cost) == ("embed", 1, Cost(weights_read=11 * 32 * 4))
    assert prompt_stages(MODEL, WORK, views=0) == [embed]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("schedule", ["adaptive", "none"])
@pytest.mark.parametrize("remerge", ["every-step", "per-block"])
def test_stages_add_up_to_the_answer(cached: bool, schedule: str, remerge: str) -> None:
    merge = MergeConfig(1, 0.8, schedule, cache=CacheMergeConfig(remerge=remerge)).in_loop(cached)  # type: ignore[arg-type]
    steps = step_merges(merge, GENERATION, WORK.visual_tokens)
    stages = answer_stages(MODEL.language, WORK, 1, steps, cached=cached)
    total = sum((stage.cost for stage in stages), Cost())
    assert total == answer_cost(MODEL.language, WORK, 1, steps, cached=cached)
    calls = {stage.stage: stage.calls for stage in stages}
    if not cached:
        assert calls == {"embed": 8, "front": 8, "merge": 8, "back": 8}
    else:
        merges = 0 if schedule == "none" else 2 if remerge == "per-block" else 7
        expected = {"prefill": 1, "rotate": 4, "embed": 8, "front": 8, "decide": 8 - merges, "merge": merges, "back": 8}
        assert calls == {stage: count for stage, count in expected.items() if count}
        assert list(calls) == [stage for stage in expected if expected[stage]]


def test_stages_of_a_merged_prefill_add_up_to_the_answer() -> None:
    merge = MergeConfig(1, 0.8, merge_at="prefill").in_loop(True)
    steps, plan = step_merges(merge, GENERATION, WORK.visual_tokens), prompt_plan(merge, WORK.visual_tokens)
    stages = answer_stages(MODEL.language, WORK, 1, steps, cached=True, prompt=plan)
    total = sum((stage.cost for stage in stages), Cost())
    assert total == answer_cost(MODEL.language, WORK, 1, steps, cached=True, prompt=plan)
    assert [(stage.stage, stage.calls) for stage in stages] == [
        *((name, 1) for name in ("prompt_front", "prompt_merge", "prompt_back")),
        ("rotate", 4),
        *((name, 9) for name in ("embed", "front", "decide")),  # once more for the mask rows
        ("back", 8),
    ]


def test_costs_repeat() -> None:
    for cost in (uncached_step(MODEL.language, WORK, 1, 5), cached_step(MODEL.language, WORK, 1, 5)):
        assert cost * 3 == cost + cost + cost
        assert (cost * 3).flops == 3 * cost.flops


def test_reductions_grow_with_the_ratio_and_fall_with_the_layer() -> None:
    table = reductions(MODEL.language, WORK, MergeConfig(0, 0.5), GENERATION, range(4), (0.5, 0.7, 0.9))
    assert all(row == sorted(row) for row in table)
    assert all(list(column) == sorted(column, reverse=True) for column in zip(*table, strict=True))
    plain = answer_cost(MODEL.language, WORK, 2, [step._replace(keep=None) for step in _plan(0.7)], cached=False)
    merged = answer_cost(MODEL.language, WORK, 2, _plan(0.7), cached=False)
    assert table[2][1] == 1 - merged.flops / plain.flops


def _plan(ratio: float) -> list[StepMerge]:
    return step_merges(MergeConfig(2, ratio), GENERATION, WORK.visual_tokens)


def test_the_paper_s_claim_at_lavida_s_size() -> None:
    """About 70 % fewer FLOPs, keeping a tenth of the visual tokens (algorithm.md, "Defaults and headline results")."""
    language = geometry_config("lavida-8b").language
    work = Workload(1083, 1008, 64, bytes_per_element=2)
    table = reductions(
        language, work, MergeConfig(3, 0.8), default_generation(geometry_config("lavida-8b")), (2, 3), (0.8, 0.9)
    )
    assert [[round(100 * share, 1) for share in row] for row in table] == [[63.4, 71.1], [61.2, 68.6]]


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(D3tomError, match="language-only"):
        vision_stage(replace(MODEL, vision=None), 1)
    with pytest.raises(D3tomError, match="-1 views"):
        prompt_stages(MODEL, WORK, views=-1)


@pytest.mark.parametrize("form", QUANT_FORMATS)
def test_a_tower_in_few_bits_is_read_in_them(form: QuantFormat) -> None:
    few, without = QuantizeRequest(form, tower=True), QuantizeRequest(form)
    shapes = product_shapes(MODEL)
    more = plan_of(shapes, few).blocks.keys() - plan_of(shapes, without).blocks.keys()
    saved = sum(2 * math.prod(shapes[name]) - (stored_bytes(few, *shapes[name], 2) or 0) for name in more)
    assert saved > 0
    whole, left, quantized = (
        vision_stage(MODEL, 1, bytes_per_element=2, quantize=each) for each in (None, without, few)
    )
    assert left == whole
    assert quantized == replace(whole, weights_read=whole.weights_read - saved)
    (vision, _), (plain, _) = (
        prompt_stages(MODEL, replace(WORK, bytes_per_element=2, quantize=each), views=3) for each in (few, None)
    )
    assert vision.cost.weights_read == plain.cost.weights_read - saved
