"""The stages' tensors: names, dtypes and dynamic axes, as data. What `inspect` shows and what others bind to.

B batch, P prompt tokens, G answer tokens, L = P + G, V visual tokens, K kept, M = L - V + K (design.md's L'),
C = P - V + K rows of a merged cache, S rows of a call. The names in :data:`DYNAMIC` vary at run time; every other axis
is a number fixed by the model.
Imports no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from d3tom_export.config import CertaintyKind, LanguageConfig, Loop, MergeConfig, ModelConfig
from d3tom_export.families.registry import family_of

DYNAMIC = ("B", "P", "G", "L", "V", "K", "M", "C", "S", "views")

EXTERNAL_POLICIES = ("random", "uniform")
"""Selection policies that look at no attention: their scores come from outside, as a further input of `merge`."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a stage: a named axis is dynamic, an integer is fixed."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]
    default: int | None = None
    """An input with a default may be left out."""


@dataclass(frozen=True)
class StageSpec:
    """A stage's inputs and outputs in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    loop: Loop | None = None
    """The loop it belongs to; None: both."""


def stage_key(name: str, loop: Loop | None, loops: Sequence[Loop]) -> str:
    """The name of a stage's file and manifest entry: its own, unless a bundle for two loops has two of that name."""
    return f"cached_{name}" if loop == "cached" and len(loops) > 1 and name in ("front", "merge", "back") else name


_F32, _I64 = "float32", "int64"


def _greedy_outputs(model: ModelConfig) -> tuple[TensorSpec, ...]:
    return (
        # An id that the embedding table has a row for; the head may have more rows, and all count for the confidence.
        TensorSpec("token", _I64, ("B", "G")),
        TensorSpec("confidence", _F32, ("B", "G")),
        # 1 / confidence - 1 without cancellation: float32 probabilities near 1 tie, this does not.
        TensorSpec("doubt", _F32, ("B", "G")),
        TensorSpec("logits", _F32, ("B", "G", model.language.head_rows)),
    )


def _shared_stages(model: ModelConfig) -> list[StageSpec]:
    width = model.language.d_model
    stages = []
    if model.vision is not None:
        side, tokens = model.vision.image_size, model.vision.tokens_per_view
        stages.append(
            StageSpec(
                "vision",
                (TensorSpec("pixel_values", _F32, ("views", 3, side, side)),),
                (TensorSpec("visual_features", _F32, ("views", tokens, width)),),
            )
        )
    token_ids, embeddings = TensorSpec("token_ids", _I64, ("B", "S")), TensorSpec("embeddings", _F32, ("B", "S", width))
    return [*stages, StageSpec("embed", (token_ids,), (embeddings,))]


def certainty_stage(model: ModelConfig) -> StageSpec:
    """What positions are ranked by where that is no token's probability; a run that does not ask for it skips it."""
    outputs = tuple(TensorSpec(name, _F32, ("B", "G")) for name in ("rest", "runner_up", "rest_entropy"))
    return StageSpec("certainty", (TensorSpec("logits", _F32, ("B", "G", model.language.head_rows)),), outputs)


CERTAINTY_OUTPUTS: dict[CertaintyKind, tuple[str, str]] = {
    "margin": ("rest", "runner_up"),
    "entropy": ("rest", "rest_entropy"),
}
"""What of stage `certainty` each kind of certainty follows from, where it is among all tokens."""

CANDIDATES = 50
"""Tokens that stage `candidates` gives: as many as the sampler of the families that have it draws from by default."""

CANDIDATES_OUTPUTS = ("likeliest", "rest")
"""What of it a certainty among the likeliest tokens follows from."""


def candidates_stage(model: ModelConfig) -> StageSpec | None:
    """The likeliest tokens of each position, where the family ranks by those alone; a run that does not skips it."""
    if family_of(model).generation.top_k is None:
        return None
    rows = model.language.head_rows
    likeliest = TensorSpec("likeliest", _F32, ("B", "G", min(CANDIDATES, rows)))
    logits = TensorSpec("logits", _F32, ("B", "G", rows))
    return StageSpec("candidates", (logits,), (likeliest, TensorSpec("rest", _F32, ("B", "G"))))


def _uncached_stages(model: ModelConfig, merge: MergeConfig, answer_length: int) -> list[StageSpec]:
    width = model.language.d_model
    hidden = TensorSpec("hidden", _F32, ("B", "L", width))
    merged = TensorSpec("merged", _F32, ("B", "M", width))
    merge_inputs = [
        hidden,
        TensorSpec("deciders", "bool", ("B", "G")),
        TensorSpec("visual_positions", _I64, ("V",)),
        TensorSpec("keep", _I64, (1,)),
    ]
    merge_outputs = [merged, TensorSpec("kept", _I64, ("B", "K"))]
    # The head runs on the answer's rows only, and `merged` alone does not say how many those are.
    back_inputs = [merged, TensorSpec("answer_length", _I64, (1,), default=answer_length)]
    if merge.select in EXTERNAL_POLICIES:
        merge_inputs.append(TensorSpec("selection_scores", _F32, ("B", "V")))
    if merge.positions == "original":
        positions = TensorSpec("positions", _I64, ("B", "M"))
        merge_outputs.append(positions)
        back_inputs.append(positions)
    embeddings = (
        TensorSpec("prompt_embeddings", _F32, ("B", "P", width)),
        TensorSpec("answer_embeddings", _F32, ("B", "G", width)),
    )
    return [
        StageSpec("front", embeddings, (hidden,), "uncached"),
        StageSpec("merge", tuple(merge_inputs), tuple(merge_outputs), "uncached"),
        StageSpec("back", tuple(back_inputs), _greedy_outputs(model), "uncached"),
    ]


def token_cache(layer: int | None, model: ModelConfig, rows: str = "P") -> tuple[TensorSpec, TensorSpec]:
    """Keys and values of ``layer`` (None: of any one) token by token, keys before the rotary embedding."""
    suffix = "" if layer is None else f"_{layer}"
    axes = ("B", rows, model.language.n_kv_heads, model.language.head_size)
    return TensorSpec(f"keys{suffix}", _F32, axes), TensorSpec(f"values{suffix}", _F32, axes)


def attention_cache(layer: int | None, model: ModelConfig, merged: bool = False) -> tuple[TensorSpec, TensorSpec]:
    """The same as attention reads them, head by head with rotated keys; ``merged`` ones have C rows instead of P."""
    kind, suffix = "merged" if merged else "attention", "" if layer is None else f"_{layer}"
    axes = ("B", model.language.n_kv_heads, "C" if merged else "P", model.language.head_size)
    return TensorSpec(f"{kind}_keys{suffix}", _F32, axes), TensorSpec(f"{kind}_values{suffix}", _F32, axes)


def _first_token(model: ModelConfig) -> list[TensorSpec]:
    """With a row shift the prompt's last row predicts the answer's first token, and no answer row does."""
    return [TensorSpec("first_token", _I64, ("B", 1))] if model.language.row_shift else []


def _prompt_stages(model: ModelConfig, merge: MergeConfig) -> list[StageSpec]:
    """What a prompt of the loop with a KV cache runs through."""
    width, layers = model.language.d_model, model.language.n_layers
    embeddings = TensorSpec("prompt_embeddings", _F32, ("B", "P", width))
    first_token = _first_token(model)

    def caches(of: range, rows: str = "P") -> list[TensorSpec]:
        return [tensor for layer in of for tensor in token_cache(layer, model, rows)]

    if merge.merge_at == "step":
        return [StageSpec("prefill", (embeddings,), (*caches(range(layers)), *first_token), "cached")]
    hidden = TensorSpec("prompt_hidden", _F32, ("B", "P", width))
    merged = TensorSpec("prompt_merged", _F32, ("B", "C", width))
    chosen = TensorSpec("visual_positions", _I64, ("V",)), TensorSpec("kept", _I64, ("B", "K"))
    later = caches(range(merge.layer + 1, layers), "C")
    return [
        StageSpec("prompt_front", (embeddings,), (hidden, *caches(range(merge.layer + 1))), "cached"),
        StageSpec("prompt_merge", (hidden, *chosen), (merged,), "cached"),
        StageSpec("prompt_back", (merged,), (*later, *first_token), "cached"),
    ]


def extended_caches(language: LanguageConfig, merge: MergeConfig) -> dict[int, bool]:
    """The layers whose cache of the prefix `extend` reads, and whether that may be a merged one.

    It is behind l* where the prompt is merged at its prefill. The last layer runs no row, so that it reads no cache;
    but for the last row's with a row shift.
    """
    layers = range(language.n_layers if language.row_shift else language.n_layers - 1)
    return {layer: merge.merge_at == "prefill" and layer > merge.layer for layer in layers}


def extend_stage(model: ModelConfig, merge: MergeConfig) -> StageSpec:
    """The rest of a prompt, S rows, over the cache of its prefix, which P and C count."""
    embeddings = TensorSpec("prompt_embeddings", _F32, ("B", "S", model.language.d_model))
    read = extended_caches(model.language, merge)
    caches = [tensor for layer, merged in read.items() for tensor in attention_cache(layer, model, merged=merged)]
    rows = [tensor for layer in range(model.language.n_layers) for tensor in token_cache(layer, model, "S")]
    return StageSpec("extend", (embeddings, *caches), (*rows, *_first_token(model)), "cached")


def _cached_stages(model: ModelConfig, merge: MergeConfig, shares_prefix: bool) -> list[StageSpec]:
    width, layers = model.language.d_model, model.language.n_layers
    later = range(merge.layer + 1, layers)
    hidden, merged = TensorSpec("hidden", _F32, ("B", "G", width)), TensorSpec("merged", _F32, ("B", "G", width))
    merged_caches = [tensor for layer in later for tensor in attention_cache(layer, model, merged=True)]
    decide_inputs = (
        hidden,
        TensorSpec("deciders", "bool", ("B", "G")),
        TensorSpec("visual_positions", _I64, ("V",)),
        TensorSpec("keep", _I64, (1,)),
        *attention_cache(merge.layer, model),
    )
    decide_outputs = (merged, TensorSpec("kept", _I64, ("B", "K")))
    return [
        *_prompt_stages(model, merge),
        *([extend_stage(model, merge)] if shares_prefix else []),
        StageSpec("rotate", token_cache(None, model), attention_cache(None, model), "cached"),
        StageSpec(
            "front",
            (
                TensorSpec("answer_embeddings", _F32, ("B", "G", width)),
                *(tensor for layer in range(merge.layer) for tensor in attention_cache(layer, model)),
            ),
            (hidden,),
            "cached",
        ),
        StageSpec("decide", decide_inputs, decide_outputs, "cached"),
        StageSpec(
            "merge",
            (*decide_inputs, *(tensor for layer in later for tensor in token_cache(layer, model))),
            (*decide_outputs, *merged_caches),
            "cached",
        ),
        StageSpec("back", (merged, *merged_caches), _greedy_outputs(model), "cached"),
    ]


def stage_specs(
    model: ModelConfig,
    merge: MergeConfig,
    answer_length: int,
    loops: Sequence[Loop],
    shares_prefix: bool = False,
) -> dict[str, StageSpec]:
    """The stages of a bundle for ``loops`` by key, in the order of a run; `vision` only where the model has eyes.

    `extend` only where the bundle ``shares_prefix``, in the loop with a KV cache.
    """
    stages = _shared_stages(model)
    if "uncached" in loops:
        stages += _uncached_stages(model, merge, answer_length)
    if "cached" in loops:
        stages += _cached_stages(model, merge, shares_prefix)
    stages.append(certainty_stage(model))
    candidates = candidates_stage(model)
    if candidates is not None:
        stages.append(candidates)
    return {stage_key(stage.name, stage.loop, loops): stage for stage in stages}
