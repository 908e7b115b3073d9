"""Where the FLOPs and bytes of an answer go, stage by stage, and what merging saves over l* and ratio.

Counted as in :mod:`d3tom_export.cost.flops`. Stage names are those of :mod:`d3tom_export.stages.contract`. Imports no
framework. B batch, P prompt tokens, V visual tokens among them, D width, n patches of a view, h width of the tower.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from d3tom_export.config import GenerationConfig, LanguageConfig, MergeConfig, ModelConfig, VisionConfig
from d3tom_export.cost.flops import (
    WHOLE_PROMPT,
    Cost,
    PromptPlan,
    StepMerge,
    Workload,
    answer_cost,
    cached_prompt_stages,
    cached_stages,
    embed,
    step_merges,
    uncached_stages,
)
from d3tom_export.errors import D3tomError
from d3tom_export.quantize.plan import QuantizeRequest, stored_bytes


@dataclass(frozen=True)
class StageTotal:
    """What one stage costs over an answer."""

    stage: str
    calls: int
    cost: Cost
    """Of all calls together."""


def _tower_weights(vision: VisionConfig, layers: int) -> int:
    """Elements of the patch convolution, the positions and ``layers`` layers, norms and biases included."""
    width, patch = vision.hidden_size, 3 * vision.patch_size**2
    attention = 4 * (width + 1) * width
    feed_forward = 2 * width * vision.intermediate_size + vision.intermediate_size + width
    norms = 4 * width
    embedding = (patch + 1) * width + vision.patches_per_side**2 * width
    return embedding + layers * (attention + feed_forward + norms)


def _saved_bytes(
    model: ModelConfig, vision: VisionConfig, layers: int, bytes_per_element: int, few: QuantizeRequest
) -> int:
    """Bytes that the products of ``layers`` layers and of the projector take less than in ``bytes_per_element``."""
    hidden, inner, width = vision.hidden_size, vision.intermediate_size, model.language.d_model
    products = [(4 * layers, hidden, hidden), (layers, inner, hidden), (layers, hidden, inner)]
    saved = 0
    for count, outputs, inputs in (*products, (1, width, hidden), (1, width, width)):
        whole = outputs * inputs * bytes_per_element
        saved += count * (whole - (stored_bytes(few, outputs, inputs, bytes_per_element) or whole))
    return saved


def vision_stage(
    model: ModelConfig,
    views: int,
    *,
    layers: int | None = None,
    bytes_per_element: int = 4,
    quantize: QuantizeRequest | None = None,
) -> Cost:
    """The tower, the projector and no product for the pooling behind it, on ``views`` views in one call.

    ``layers`` of the tower that run; None: all but the last, as released. ``quantize`` are weights in few bits, the
    tower's where it says so. Raises :class:`D3tomError` for a language-only model.
    """
    vision, width = model.vision, model.language.d_model
    if vision is None:
        raise D3tomError("This model is language-only: it has no vision tower whose FLOPs could be counted.")
    layers = vision.num_hidden_layers - 1 if layers is None else layers
    hidden, patches = vision.hidden_size, vision.patches_per_side**2
    rows = views * patches
    weights = (_tower_weights(vision, layers) + (hidden + 1 + width + 1) * width) * bytes_per_element
    if quantize is not None and quantize.tower:
        weights -= _saved_bytes(model, vision, layers, bytes_per_element, quantize)
    return Cost(
        patches=2 * rows * 3 * vision.patch_size**2 * hidden,
        projections=layers * 8 * rows * hidden**2,
        attention=layers * 4 * rows * patches * hidden,
        feed_forward=layers * 4 * rows * hidden * vision.intermediate_size,
        projector=2 * rows * (hidden + width) * width,
        weights_read=weights,
    )


def prompt_stages(
    model: ModelConfig, work: Workload, views: int, *, tower_layers: int | None = None
) -> list[StageTotal]:
    """What a prompt costs before either loop begins: ``views`` views of each of the batch's prompts, and its text."""
    if views < 0:
        raise D3tomError(f"{views} views of pictures cannot be encoded: expected 0 or more.")
    stages = []
    if views:
        cost = vision_stage(
            model,
            work.batch * views,
            layers=tower_layers,
            bytes_per_element=work.bytes_per_element,
            quantize=work.quantize,
        )
        stages.append(StageTotal("vision", 1, cost))
    text = work.prompt_tokens - work.visual_tokens
    return [*stages, StageTotal("embed", 1, embed(model.language, text, work.bytes_per_element))]


def answer_stages(
    config: LanguageConfig,
    work: Workload,
    layer: int,
    steps: Iterable[StepMerge],
    *,
    cached: bool,
    prompt: PromptPlan = WHOLE_PROMPT,
) -> list[StageTotal]:
    """:func:`d3tom_export.cost.flops.answer_cost` by stage, in the order of a run."""
    totals: dict[str, StageTotal] = {}
    if cached:
        for name, cost in cached_prompt_stages(config, work, layer, prompt).items():
            totals[name] = StageTotal(name, config.n_layers if name == "rotate" else 1, cost)
    for step in steps:
        stages = (
            cached_stages(config, work, layer, step.keep, merges_afresh=step.afresh)
            if cached
            else uncached_stages(config, work, layer, step.keep)
        )
        for name, cost in stages.items():
            before = totals.get(name, StageTotal(name, 0, Cost()))
            totals[name] = StageTotal(name, before.calls + 1, before.cost + cost)
    order = (
        "prefill",
        "prompt_front",
        "prompt_merge",
        "prompt_back",
        "rotate",
        "embed",
        "front",
        "decide",
        "merge",
        "back",
    )
    return [totals[name] for name in order if name in totals]


def reductions(
    config: LanguageConfig,
    work: Workload,
    merge: MergeConfig,
    generation: GenerationConfig,
    layers: Sequence[int],
    ratios: Sequence[float],
) -> list[list[float]]:
    """The share of an uncached answer's FLOPs that merging saves, a row for each l* and a column for each ratio.

    The paper's figure 5. ``merge`` gives the schedule; its own layer and ratio do not matter.
    """
    unmerged = step_merges(replace(merge, schedule="none"), generation, work.visual_tokens)
    plain = answer_cost(config, work, 0, unmerged, cached=False).flops
    plans = [step_merges(replace(merge, ratio=ratio), generation, work.visual_tokens) for ratio in ratios]
    return [
        [1 - answer_cost(config, work, layer, plan, cached=False).flops / plain for plan in plans] for layer in layers
    ]
