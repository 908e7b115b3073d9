"""What one answer costs, stage by stage: exact FLOPs and bytes of the loop without and with a KV cache.

FLOPs are those of matrix products alone, two per multiply-add: what ``torch.utils.flop_counter`` counts and what the
time of a large model goes to. Norms, softmax, the sums of merging and sampling are left out. Bytes are the traffic
that batching and merging change: weights and cache, not activations. The prompt's embeddings, vision tower included,
cost the same in every loop and are left to :mod:`d3tom_export.cost.flop_stages`.

Merging as in algorithm.md, under the "decider" policy with sums. Imports no framework.
B batch, P prompt tokens, V visual tokens among them, G answer tokens, L = P + G, K visual tokens kept, L' = L - V + K,
C = P - V + K, D width, H query heads, N key/value heads, d head size, F feed-forward width, l* the merge layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from operator import add, attrgetter
from typing import NamedTuple

from d3tom_export.config import GenerationConfig, LanguageConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.step_plan import block_plan
from d3tom_export.merging.schedule import kept_at_prefill, kept_tokens, merge_ratio
from d3tom_export.quantize.plan import QuantizeRequest, stored_bytes


@dataclass(frozen=True)
class Workload:
    """The sizes of one answer."""

    prompt_tokens: int
    """P, visual tokens included."""
    visual_tokens: int
    """V, 0..P."""
    answer_tokens: int
    """G."""
    batch: int = 1
    """B."""
    bytes_per_element: int = 4
    """Of weights and cache: 4 for float32, 2 for float16 and bfloat16."""
    quantize: QuantizeRequest | None = None
    """Weights in few bits, whose scales take ``bytes_per_element``."""

    def __post_init__(self) -> None:
        positive = min(self.prompt_tokens, self.answer_tokens, self.batch, self.bytes_per_element) >= 1
        if not positive or not 0 <= self.visual_tokens <= self.prompt_tokens:
            raise D3tomError(f"{self} cannot be: expected sizes of at least 1 and no more visual tokens than prompt.")

    @property
    def tokens(self) -> int:
        """L."""
        return self.prompt_tokens + self.answer_tokens

    def merged_away(self, keep: int | None) -> int:
        """V - K, visual tokens fewer after a merge that keeps ``keep``; 0 where nothing merges (None)."""
        return 0 if keep is None else self.visual_tokens - keep


class PromptPlan(NamedTuple):
    """How the prompt of an answer with a KV cache is prefilled."""

    keep: int | None = None
    """K of a merge at the prefill; None where it merges nothing."""
    scored: bool = True
    """Whether the answer's mask rows are run to decide there, as under the "decider" policy."""


WHOLE_PROMPT = PromptPlan()
"""Nothing is merged at the prefill."""


class StepMerge(NamedTuple):
    """What one step merges."""

    keep: int | None
    """K; None where nothing merges. A merge may keep all V."""
    afresh: bool = True
    """With a KV cache: whether the cache is merged at this step, or one merged earlier, at the prefill too, serves."""


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of a stage, a step or a whole answer, by part. Costs add up with ``+`` and repeat with ``*``."""

    projections: int = 0
    """FLOPs of the linear layers of attention: queries, keys, values, output."""
    attention: int = 0
    """FLOPs of queries times keys and of probabilities times values."""
    feed_forward: int = 0
    """FLOPs of the linear layers behind attention: three of SwiGLU, two in the vision tower."""
    head: int = 0
    """FLOPs of the language head."""
    importance: int = 0
    """FLOPs of the answer rows' second product with the keys of layer l*, for a runtime whose attention keeps its
    probabilities to itself."""
    search: int = 0
    """FLOPs of the cosine similarities by which merged tokens find their targets."""
    patches: int = 0
    """FLOPs of the convolution that turns a view's patches into the vision tower's rows."""
    projector: int = 0
    """FLOPs of the two linear layers from the tower's width to D."""
    weights_read: int = 0
    """Bytes of weights: each once a call, whatever the batch."""
    cache_read: int = 0
    """Bytes of the prompt's keys and values read."""
    cache_written: int = 0
    """Bytes of the prompt's keys and values written: by the prefill, into attention's form, or by merging."""

    @property
    def flops(self) -> int:
        vision = self.patches + self.projector
        language = self.projections + self.attention + self.feed_forward + self.head + self.importance + self.search
        return language + vision

    @property
    def bytes(self) -> int:
        return self.weights_read + self.cache_read + self.cache_written

    def __add__(self, other: Cost) -> Cost:
        return Cost(*map(add, _parts(self), _parts(other)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(part * times for part in _parts(self)))


_parts = attrgetter(*(part.name for part in fields(Cost)))
"""A cost's parts in order; looked up once, because a picture of reductions adds up costs by the ten thousand."""


def _kv_width(config: LanguageConfig) -> int:
    """N * d, elements of a token's keys (or values) in one layer."""
    return config.n_kv_heads * config.head_size


def _key_value_projections(config: LanguageConfig, rows: int) -> int:
    return 4 * rows * config.d_model * _kv_width(config)


def _projections(config: LanguageConfig, rows: int) -> int:
    return 4 * rows * config.d_model * config.d_model + _key_value_projections(config, rows)


def _attention(config: LanguageConfig, queries: int, keys: int) -> int:
    """Grouped queries share keys but no products, so N does not matter. Half of it is queries times keys."""
    return 4 * queries * keys * config.d_model


def _feed_forward(config: LanguageConfig, rows: int) -> int:
    return 6 * rows * config.d_model * config.mlp_hidden_size


def _key_value_weights(config: LanguageConfig) -> int:
    """Elements that turn a layer's input into keys and values: the norm, two linear layers, their biases."""
    inputs = config.d_model + int(config.include_qkv_bias)
    return config.d_model + 2 * inputs * _kv_width(config)


def layer_weights(config: LanguageConfig) -> int:
    """Elements of one transformer block, norms and biases included."""
    width = config.d_model
    query_and_output = 2 * width * width + width * int(config.include_qkv_bias)
    return _key_value_weights(config) + query_and_output + width + 3 * width * config.mlp_hidden_size


def _matrix_bytes(work: Workload, outputs: int, inputs: int) -> int:
    """Bytes of a product's weight, as it is read."""
    whole = outputs * inputs * work.bytes_per_element
    if work.quantize is None:
        return whole
    return stored_bytes(work.quantize, outputs, inputs, work.bytes_per_element) or whole


def _key_value_bytes(config: LanguageConfig, work: Workload) -> int:
    """Bytes of :func:`_key_value_weights`."""
    matrices = 2 * _matrix_bytes(work, _kv_width(config), config.d_model)
    others = config.d_model + 2 * _kv_width(config) * int(config.include_qkv_bias)
    return matrices + others * work.bytes_per_element


def layer_bytes(config: LanguageConfig, work: Workload) -> int:
    """Bytes of one transformer block's weights."""
    width, inner = config.d_model, config.mlp_hidden_size
    feed_forward = 2 * _matrix_bytes(work, inner, width) + _matrix_bytes(work, width, inner)
    others = width + width * int(config.include_qkv_bias)
    matrices = 2 * _matrix_bytes(work, width, width) + feed_forward
    return _key_value_bytes(config, work) + matrices + others * work.bytes_per_element


def cache_bytes_per_token(config: LanguageConfig, bytes_per_element: int) -> int:
    """Bytes of one prompt token's keys and values over all layers (LaViDa-LLaDA-8B in bfloat16: 524,288)."""
    return config.n_layers * 2 * _kv_width(config) * bytes_per_element


def _check_merge(config: LanguageConfig, work: Workload, layer: int, keep: int | None) -> None:
    if not 0 <= layer < config.n_layers:
        raise D3tomError(f"merge layer {layer} is outside this model: it has {config.n_layers} layers, counted from 0.")
    if keep is not None and not 1 <= keep <= work.visual_tokens:
        raise D3tomError(f"{keep} visual tokens cannot be kept: a merge keeps 1 to {work.visual_tokens} of them.")


def _block(config: LanguageConfig, work: Workload, rows: int, keys: int, feed_forward_rows: int) -> Cost:
    """One block in which ``rows`` tokens attend over ``keys`` and ``feed_forward_rows`` go through the feed-forward."""
    return Cost(
        projections=work.batch * _projections(config, rows),
        attention=work.batch * _attention(config, rows, keys),
        feed_forward=work.batch * _feed_forward(config, feed_forward_rows),
        weights_read=layer_bytes(config, work),
    )


def _answer_block(config: LanguageConfig, work: Workload, rows: int) -> Cost:
    """A block of ``rows`` tokens of which only the answer's are wanted: the others give keys and values."""
    answer = _block(config, work, work.answer_tokens, rows, work.answer_tokens)
    others = rows - work.answer_tokens
    return answer + Cost(projections=work.batch * _key_value_projections(config, others))


def _head(config: LanguageConfig, work: Workload) -> Cost:
    """Final norm and language head, on the answer's rows alone."""
    whole = work if work.quantize is not None and work.quantize.head else replace(work, quantize=None)
    matrix = _matrix_bytes(whole, config.head_rows, config.d_model)
    return Cost(
        head=2 * work.batch * work.answer_tokens * config.d_model * config.head_rows,
        weights_read=config.d_model * work.bytes_per_element + matrix,
    )


def embed(config: LanguageConfig, tokens: int, bytes_per_element: int) -> Cost:
    """The rows of the embedding table that ``tokens`` ids read: no product, and no row a second time for a batch."""
    return Cost(weights_read=tokens * config.d_model * bytes_per_element)


def uncached_stages(
    config: LanguageConfig, work: Workload, layer: int, keep: int | None, *, whole_last_layer: bool = False
) -> dict[str, Cost]:
    """One step over the whole sequence, by stage in the order of a run.

    ``keep`` K; None where nothing merges, and ``layer`` l* only says where the stages are cut. Layer l* still attends
    over L rows; its feed-forward is the first product on L' rows. Of the last layer, where that is behind l*, the
    head reads the answer's rows; the others only give keys and values. ``whole_last_layer`` counts the rest of it too,
    which the eager oracle, as the release, computes and throws away.
    """
    _check_merge(config, work, layer, keep)
    full, short = work.tokens, work.tokens - work.merged_away(keep)
    merges = Cost()
    if keep is not None:
        answer_rows = work.batch * work.answer_tokens
        merges = Cost(
            importance=_attention(config, answer_rows, full) // 2,
            search=2 * work.batch * work.visual_tokens * keep * config.d_model,
        )
    later = config.n_layers - layer - 1
    whole = _block(config, work, short, short, short)
    last = whole if whole_last_layer else _answer_block(config, work, short)
    return {
        "embed": embed(config, work.answer_tokens, work.bytes_per_element),
        "front": _block(config, work, full, full, full) * layer,
        "merge": _block(config, work, full, full, short) + merges,
        "back": (whole * (later - 1) + last if later else Cost()) + _head(config, work),
    }


def uncached_step(
    config: LanguageConfig, work: Workload, layer: int, keep: int | None, *, whole_last_layer: bool = False
) -> Cost:
    """The sum of :func:`uncached_stages`."""
    stages = uncached_stages(config, work, layer, keep, whole_last_layer=whole_last_layer)
    return sum(stages.values(), Cost())


def prefill(config: LanguageConfig, work: Workload, *, whole_last_layer: bool = False) -> Cost:
    """The prompt alone through all layers, once an answer.

    The last layer only has to give keys and values, and with a row shift the last row's token. ``whole_last_layer``
    counts the rest of it too, which the eager oracle computes and throws away.
    """
    prompt = work.prompt_tokens
    last = Cost(
        projections=work.batch * _key_value_projections(config, prompt),
        weights_read=_key_value_bytes(config, work),
    )
    whole, first_token = _block(config, work, prompt, prompt, prompt), Cost()
    if config.row_shift:
        one = replace(work, answer_tokens=1)
        last, first_token = _answer_block(config, one, prompt), _head(config, one)
    written = Cost(cache_written=work.batch * prompt * cache_bytes_per_token(config, work.bytes_per_element))
    return whole * (config.n_layers - 1) + (whole if whole_last_layer else last) + first_token + written


def rotate(config: LanguageConfig, work: Workload) -> Cost:
    """The prompt's keys and values of every layer copied into the form that attention reads, once an answer."""
    return _rotated(config, work, config.n_layers, work.prompt_tokens)


def _rotated(config: LanguageConfig, work: Workload, layers: int, rows: int) -> Cost:
    """So many ``rows`` of the cache of ``layers`` layers copied into the form that attention reads."""
    moved = work.batch * rows * layers * 2 * _kv_width(config) * work.bytes_per_element
    return Cost(cache_read=moved, cache_written=moved)


def merged_prefill_stages(
    config: LanguageConfig,
    work: Workload,
    layer: int,
    keep: int,
    *,
    scored: bool = True,
    whole_last_layer: bool = False,
    recomputes_importance: bool = False,
) -> dict[str, Cost]:
    """The prompt merged once, while it is prefilled, by stage in the order of a run; ``layer`` l*, ``keep`` K.

    The prompt runs alone through layers 0..l*-1; where ``scored``, the answer's mask rows run over its cache through
    layers 0..l*. Layer l* runs on the prompt's P rows, its feed-forward on C, the later layers on C; the keys and
    values of l* are computed for the cache and for the merge. The two other options are those of :func:`prefill` and of
    :func:`cached_stages`. Raises :class:`D3tomError` for the last layer, behind which no other would read the short
    prompt (:meth:`MergeConfig.check_layer`).
    """
    _check_merge(config, work, layer, keep)
    MergeConfig(layer, 0.0, merge_at="prefill").check_layer(config.n_layers)
    prompt, short = work.prompt_tokens, work.prompt_tokens - work.merged_away(keep)
    later = config.n_layers - layer - 1
    row = work.batch * 2 * _kv_width(config) * work.bytes_per_element

    def keys_and_values(rows: int) -> Cost:
        return Cost(
            projections=work.batch * _key_value_projections(config, rows),
            weights_read=_key_value_bytes(config, work),
        )

    front = _block(config, work, prompt, prompt, prompt) * layer + keys_and_values(prompt)
    whole, last, first_token = _block(config, work, short, short, short), keys_and_values(short), Cost()
    if config.row_shift:
        one = replace(work, answer_tokens=1)
        last, first_token = _answer_block(config, one, short), _head(config, one)
    stages = {
        "prompt_front": front + Cost(cache_written=row * prompt * (layer + 1)),
        "rotate": _rotated(config, work, layer + 1, prompt) + _rotated(config, work, later, short),
    }
    if scored:
        step = cached_stages(
            config, work, layer, keep, merges_afresh=False, recomputes_importance=recomputes_importance
        )
        stages |= {name: step[name] for name in ("embed", "front", "decide")}
    search = Cost(search=2 * work.batch * work.visual_tokens * keep * config.d_model)
    back = whole * (later - 1) + (whole if whole_last_layer else last) + first_token
    return stages | {
        "prompt_merge": _block(config, work, prompt, prompt, short) + search,
        "prompt_back": back + Cost(cache_written=row * short * later),
    }


def merged_prefill(
    config: LanguageConfig,
    work: Workload,
    layer: int,
    keep: int,
    *,
    scored: bool = True,
    whole_last_layer: bool = False,
    recomputes_importance: bool = False,
) -> Cost:
    """The sum of :func:`merged_prefill_stages`."""
    stages = merged_prefill_stages(
        config,
        work,
        layer,
        keep,
        scored=scored,
        whole_last_layer=whole_last_layer,
        recomputes_importance=recomputes_importance,
    )
    return sum(stages.values(), Cost())


def cached_prompt_stages(config: LanguageConfig, work: Workload, layer: int, prompt: PromptPlan) -> dict[str, Cost]:
    """What comes before the steps of an answer with a KV cache, by stage in the order of a run.

    A prompt of which nothing is merged is counted as :func:`prefill`, whatever stages the bundle has for it.
    """
    if prompt.keep is None:
        return {"prefill": prefill(config, work), "rotate": rotate(config, work)}
    return merged_prefill_stages(config, work, layer, prompt.keep, scored=prompt.scored)


def cached_stages(
    config: LanguageConfig,
    work: Workload,
    layer: int,
    keep: int | None,
    *,
    merges_afresh: bool = True,
    recomputes_importance: bool = False,
) -> dict[str, Cost]:
    """One step over the answer's rows, after :func:`prefill` and :func:`rotate`, by stage in the order of a run.

    ``keep`` K; None where nothing merges. ``merges_afresh``: whether the cache of the layers behind l* is merged at
    this step (stage "merge": it is read whole, C rows are written and read again) or was at an earlier one (stage
    "decide"); with K = V there is nothing to merge. ``recomputes_importance``: whether scoring repeats a product that
    the attention of l* has done already, as in the eager oracle.
    """
    _check_merge(config, work, layer, keep)
    prompt, answer = work.prompt_tokens, work.answer_tokens
    merged = prompt - work.merged_away(keep)
    afresh = merges_afresh and merged < prompt
    later = config.n_layers - layer - 1
    cached_row = work.batch * 2 * _kv_width(config) * work.bytes_per_element

    def block(cached: int) -> Cost:
        return _block(config, work, answer, cached + answer, answer) + Cost(cache_read=cached_row * cached)

    at_layer = block(prompt)
    if recomputes_importance and keep is not None:
        at_layer += Cost(importance=work.batch * _attention(config, answer, prompt + answer) // 2)
    if afresh:
        search = 2 * work.batch * prompt * merged * config.head_size
        at_layer += Cost(search=search, cache_read=cached_row * prompt, cache_written=cached_row * merged) * later
    return {
        "embed": embed(config, answer, work.bytes_per_element),
        "front": block(prompt) * layer,
        "merge" if afresh else "decide": at_layer,
        "back": block(merged) * later + _head(config, work),
    }


def cached_step(
    config: LanguageConfig,
    work: Workload,
    layer: int,
    keep: int | None,
    *,
    merges_afresh: bool = True,
    recomputes_importance: bool = False,
) -> Cost:
    """The sum of :func:`cached_stages`."""
    stages = cached_stages(
        config, work, layer, keep, merges_afresh=merges_afresh, recomputes_importance=recomputes_importance
    )
    return sum(stages.values(), Cost())


def step_merges(
    merge: MergeConfig, generation: GenerationConfig, visual_tokens: int, *, first_token: bool = False
) -> list[StepMerge]:
    """The merge of each step of an answer, as :func:`d3tom_export.loop.denoise.denoise` asks for it.

    ``merge`` holds for one loop (:meth:`MergeConfig.in_loop`). An answer's first step has no decider and never merges;
    that of a later block does; where the prompt was merged at its prefill, every step holds that. Remerging "on-change"
    counts as at every step, its upper bound. ``first_token`` tells whether the prompt gives the answer's first token,
    as with a row shift and a KV cache. No answer is thought to stop.
    """
    steps: list[StepMerge] = []
    decided, at_prefill = False, kept_at_prefill(merge, visual_tokens)
    for block in range(generation.blocks):
        held: StepMerge | None = None
        masks = generation.block - int(first_token and block == 0)
        for step, count in enumerate(block_plan(generation, masks)):
            if at_prefill is not None:
                steps.append(StepMerge(at_prefill, afresh=False))
            elif merge.schedule == "none" or not visual_tokens or not decided:
                steps.append(StepMerge(None))
            else:
                ratio = merge_ratio(merge, step, generation.steps_per_block)
                keep = kept_tokens(visual_tokens, ratio, merge.keep_multiple)
                steps.append(held or StepMerge(keep))
                if merge.cache.remerge == "per-block":
                    held = steps[-1]._replace(afresh=False)
            decided |= count > 0
    return steps


def prompt_plan(merge: MergeConfig, visual_tokens: int) -> PromptPlan:
    """How a prompt is prefilled; ``merge`` holds for one loop, as for :func:`step_merges`."""
    keep = kept_at_prefill(merge, visual_tokens)
    return WHOLE_PROMPT if keep in (None, visual_tokens) else PromptPlan(keep, merge.select == "decider")


def answer_cost(
    config: LanguageConfig,
    work: Workload,
    layer: int,
    steps: Iterable[StepMerge],
    *,
    cached: bool,
    prompt: PromptPlan = WHOLE_PROMPT,
) -> Cost:
    """A whole answer of ``steps``, merging at ``layer``; where ``cached``, what ``prompt`` takes is part of it."""
    if not cached:
        return sum((uncached_step(config, work, layer, step.keep) for step in steps), Cost())
    costs = (cached_step(config, work, layer, step.keep, merges_afresh=step.afresh) for step in steps)
    return sum(costs, sum(cached_prompt_stages(config, work, layer, prompt).values(), Cost()))
