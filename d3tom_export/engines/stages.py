"""The stages that engines are of: the contract's, but for the loop with a KV cache, whose weights lie there once.

A bundle has a graph for each thing that a block is asked: `prefill` runs it on the prompt, `front`, `decide` and `back`
on the answer's rows, `merge` runs layer l* once more. As engines each of them would bring weights of its own. So the
engines of this loop are cut otherwise, by rewriting the same graphs:

* `front`, `decide` and `back` also give the keys and values of their new rows, and take S rows: the G of an answer over
  a cache, or the P of a prompt over an empty one. Those are two optimization profiles of one engine, :data:`STEP` and
  :data:`PROMPT`; there is no engine of `prefill`. `back` runs its head on the last `answer_length` rows.
* `merge` is only what `decide` is not: the merging of the later layers' caches, which has no weights.
* Of a bundle that merges its prompt at the prefill, `prompt_front` is `front` and `decide` in the prompt's profile, and
  `prompt_back` is `back` in it, whose S are the C rows left there. `prompt_merge` is an engine, as its graph is: it
  holds the weights of layer l* once more.
* There is no engine of `extend`: engines do not share a prompt's prefix.

The rewriting is :mod:`d3tom_export.engines.rewrite`; this module imports neither onnx nor TensorRT.

B batch, S rows of a call, P prompt, C cached rows, N key/value heads, d head size, l* the merge layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from d3tom_export.bundle.half import HALF_DTYPES
from d3tom_export.config import MergeConfig, ModelConfig
from d3tom_export.engines.shapes import SHAPE_INPUTS, SHORT_PROMPT, Profile, Range, stage_profile
from d3tom_export.stages.contract import StageSpec, TensorSpec, attention_cache, token_cache

STEP, PROMPT = 0, 1
"""Optimization profiles of the engines that serve both."""
PROMPT_SIZES: Mapping[str, int] = {"P": 0, "C": 0, "G": 1, "K": 1}
"""Sizes of axes while the prompt is run, whose P rows are S: no cache, and one row through the head, which nobody
reads."""

PROMPT_ENGINES = ("front", "decide", "back")
"""What a prompt runs through, in order."""

NO_CACHE, UNREAD = "no_cache", "unread"
"""Buffers of caches without rows, and of outputs that are not read."""
PROMPT_HIDDEN, PROMPT_MERGED = "prompt_hidden", "prompt_merged"
"""Buffers between the parts of a prompt that is merged at its prefill: `prompt_merge`'s own tensors."""
PROMPT_DECIDERS = "prompt_deciders"
"""A buffer of (B, P) bool: a prompt has no deciders, but its rows pass through `decide`."""

_ROWS = "S"

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}
"""Of an element of engines' tensors."""

HOST_TENSORS = frozenset(
    (
        "pixel_values",
        "visual_features",
        "embeddings",
        "prompt_embeddings",
        "answer_embeddings",
        "selection_scores",
        "confidence",
        "doubt",
        "logits",
        "rest",
        "runner_up",
        "rest_entropy",
        "likeliest",
    )
)
"""Floating-point stage tensors that the host reads or writes: float32 in every precision."""


def engine_stages(stages: Mapping[str, StageSpec], model: ModelConfig, merge: MergeConfig) -> dict[str, StageSpec]:
    """The stages that a bundle's engines are of, by key; ``stages`` are those of its manifest.

    Tensors are those of the contract but for what the module's docstring says. `prefill` is left out, as are `extend`,
    `prompt_front` and `prompt_back`, and a `merge` of no later layer's cache.
    """
    found = {key: _engine_stage(stage, model, merge) for key, stage in stages.items()}
    return {key: stage for key, stage in found.items() if stage is not None}


def _engine_stage(stage: StageSpec, model: ModelConfig, merge: MergeConfig) -> StageSpec | None:
    if stage.loop != "cached" or stage.name in ("rotate", "prompt_merge"):
        return stage
    later = range(merge.layer + 1, model.language.n_layers)
    layers = {"front": range(merge.layer), "decide": range(merge.layer, merge.layer + 1), "back": later}
    if stage.name in layers:
        inputs, outputs = [_of_rows(tensor) for tensor in stage.inputs], [_of_rows(tensor) for tensor in stage.outputs]
        if stage.name == "back":
            # The head's rows are the answer's, whatever else was run.
            inputs, outputs = [*inputs, TensorSpec("answer_length", "int64", (1,))], list(stage.outputs)
        for layer in layers[stage.name]:
            outputs += [replace(tensor, axes=("B", _ROWS, *tensor.axes[2:])) for tensor in token_cache(layer, model)]
        return replace(stage, inputs=tuple(inputs), outputs=tuple(outputs))
    if stage.name == "merge" and later:
        rows = [tensor for layer in later for tensor in token_cache(layer, model)]
        merged = [tensor for layer in later for tensor in attention_cache(layer, model, merged=True)]
        chosen = TensorSpec("kept", "int64", ("B", "K")), TensorSpec("visual_positions", "int64", ("V",))
        return replace(stage, inputs=(*chosen, *rows), outputs=tuple(merged))
    return None


def _of_rows(tensor: TensorSpec) -> TensorSpec:
    """``tensor`` with S rows where it had the answer's."""
    return replace(tensor, axes=tuple(_ROWS if axis == "G" else axis for axis in tensor.axes))


def prompt_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the axes while a prompt runs, whose B, P and V are in ``sizes``."""
    return {**sizes, _ROWS: sizes["P"], **PROMPT_SIZES}


def stage_profiles(stage: StageSpec, axes: Mapping[str, Range]) -> tuple[Profile, ...]:
    """The optimization profiles of an engine of ``stage``; ``axes`` are those of `shapes.axis_ranges`."""
    if not serves_prompt(stage):
        return (stage_profile(stage, axes),)
    rows = axes[SHORT_PROMPT] if stage.name == "back" else axes["P"]
    prompt = {**axes, _ROWS: rows} | {axis: Range(size, size, size) for axis, size in PROMPT_SIZES.items()}
    return stage_profile(stage, {**axes, _ROWS: axes["G"]}), stage_profile(stage, prompt)


def served_sizes(stage: StageSpec, axes: Mapping[str, Range]) -> dict[str, str]:
    """The ranges that :func:`stage_profiles` follow from and a user can change, by the contract's axes."""
    used = {axis for tensor in stage.inputs for axis in tensor.axes if isinstance(axis, str)}
    used |= {SHAPE_INPUTS[tensor.name] for tensor in stage.inputs if tensor.name in SHAPE_INPUTS}
    if serves_prompt(stage):
        used = used - {_ROWS} | {"P", "G"}
    if stage.name == "rotate" and axes[SHORT_PROMPT] != axes["P"]:
        used = used | {"C"}
    return {axis: str(axes[axis]) for axis in sorted(used)}


def serves_prompt(stage: StageSpec) -> bool:
    """Whether the engine of ``stage`` runs the prompt too, in a profile of its own."""
    return stage.loop == "cached" and stage.name in PROMPT_ENGINES


def buffers(stage: StageSpec, profile: int = STEP, *, merges_prompt: bool = False) -> dict[str, str]:
    """Device buffers by the tensors of ``stage`` that lie in one of another name while ``profile`` runs.

    `embed` writes where `front` reads. A prompt's caches are empty, its keys and values are the loop's cache; those of
    an answer's rows are of this step alone, and nobody reads them. Where the prefill ``merges_prompt``, its rows wait
    for `prompt_merge` while the answer's run through the same engines, and `back` takes what that leaves.
    """
    if stage.name == "embed":
        return {"embeddings": "answer_embeddings"}
    if not serves_prompt(stage):
        return {}
    if profile == STEP:
        return {tensor.name: UNREAD for tensor in stage.outputs if tensor.name.startswith(("keys_", "values_"))}
    places = {"answer_embeddings": "prompt_embeddings", "deciders": PROMPT_DECIDERS}
    places |= {tensor.name: NO_CACHE for tensor in stage.inputs if "keys_" in tensor.name or "values_" in tensor.name}
    if merges_prompt:
        places |= {"merged": PROMPT_MERGED} if stage.name == "back" else {"hidden": PROMPT_HIDDEN}
    return places


def engine_tensors(tensors: Sequence[TensorSpec], precision: str) -> tuple[TensorSpec, ...]:
    """Stage tensors with the dtypes that they have in an engine of ``precision``; no input is optional there."""
    low = HALF_DTYPES.get(precision, "float32")
    return tuple(
        TensorSpec(t.name, low if t.dtype == "float32" and t.name not in HOST_TENSORS else t.dtype, t.axes)
        for t in tensors
    )
