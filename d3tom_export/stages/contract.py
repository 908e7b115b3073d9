"""The stages' tensors: names, dtypes and dynamic axes, as data. What `inspect` shows and what others bind to.

B batch, P prompt tokens, G answer tokens, L = P + G, V visual tokens, K kept, M = L - V + K (design.md's L'), S rows of
a call. The names in :data:`DYNAMIC` vary at run time; every other axis is a number fixed by the model.
Imports no framework.
"""

from __future__ import annotations

from dataclasses import dataclass

from d3tom_export.config import MergeConfig, ModelConfig

DYNAMIC = ("B", "P", "G", "L", "V", "K", "M", "S", "views")

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


def stage_specs(model: ModelConfig, merge: MergeConfig, answer_length: int) -> dict[str, StageSpec]:
    """The stages of an uncached bundle in the order of a run; `vision` only where the model has eyes."""
    width, vocabulary = model.language.d_model, model.language.vocab_rows
    f32, i64 = "float32", "int64"
    specs = []
    if model.vision is not None:
        side, tokens = model.vision.image_size, model.vision.tokens_per_view
        specs.append(
            StageSpec(
                "vision",
                (TensorSpec("pixel_values", f32, ("views", 3, side, side)),),
                (TensorSpec("visual_features", f32, ("views", tokens, width)),),
            )
        )
    merge_inputs = [
        TensorSpec("hidden", f32, ("B", "L", width)),
        TensorSpec("deciders", "bool", ("B", "G")),
        TensorSpec("visual_positions", i64, ("V",)),
        TensorSpec("keep", i64, (1,)),
    ]
    merge_outputs = [TensorSpec("merged", f32, ("B", "M", width)), TensorSpec("kept", i64, ("B", "K"))]
    back_inputs = [
        TensorSpec("merged", f32, ("B", "M", width)),
        # The head runs on the answer's rows only, and `merged` alone does not say how many those are.
        TensorSpec("answer_length", i64, (1,), default=answer_length),
    ]
    if merge.select in EXTERNAL_POLICIES:
        merge_inputs.append(TensorSpec("selection_scores", f32, ("B", "V")))
    if merge.positions == "original":
        merge_outputs.append(TensorSpec("positions", i64, ("B", "M")))
        back_inputs.append(TensorSpec("positions", i64, ("B", "M")))
    specs += [
        StageSpec(
            "embed",
            (TensorSpec("token_ids", i64, ("B", "S")),),
            (TensorSpec("embeddings", f32, ("B", "S", width)),),
        ),
        StageSpec(
            "front",
            (
                TensorSpec("prompt_embeddings", f32, ("B", "P", width)),
                TensorSpec("answer_embeddings", f32, ("B", "G", width)),
            ),
            (TensorSpec("hidden", f32, ("B", "L", width)),),
        ),
        StageSpec("merge", tuple(merge_inputs), tuple(merge_outputs)),
        StageSpec(
            "back",
            tuple(back_inputs),
            (
                TensorSpec("token", i64, ("B", "G")),
                TensorSpec("confidence", f32, ("B", "G")),
                # 1 / confidence - 1 without cancellation: float32 probabilities near 1 tie, this does not.
                TensorSpec("doubt", f32, ("B", "G")),
                TensorSpec("logits", f32, ("B", "G", vocabulary)),
            ),
        ),
    ]
    return {spec.name: spec for spec in specs}
