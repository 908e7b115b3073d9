"""The device memory that a loop's engines need: weights, and the buffers that lie between them.

On paper, from sizes alone; what CUDA and TensorRT take for themselves (contexts, kernels, persistent state) comes on
top. B batch, P prompt, G answer tokens, V visual tokens, C = P - V + K rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from d3tom_export.checkpoint.tensors import released_shapes
from d3tom_export.config import LanguageConfig, Loop, MergeConfig, ModelConfig
from d3tom_export.engines.record import EngineRecord
from d3tom_export.engines.shapes import SHAPE_INPUTS
from d3tom_export.engines.stages import (
    ITEM_BYTES,
    PROMPT,
    STEP,
    buffers,
    engine_stages,
    engine_tensors,
    prompt_sizes,
    serves_prompt,
)
from d3tom_export.stages.contract import StageSpec, TensorSpec, stage_specs

GIB = 2**30

_CACHE = re.compile(r"(keys|values)_\d+$")
_USUAL = 1
"""Of a profile's sizes."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of device memory by what they are for."""

    weights: int
    """In engines' plans, kernels included where they are known."""
    cache: int
    """Keys and values: 4*B*P*N*d elements a layer in the loop with a KV cache, none in the other."""
    buffers: int
    """The other tensors that stages hand on."""
    activations: int
    """Of the stage that needs most, an estimate: what is alive at once inside it."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.buffers + self.activations

    def to_json(self) -> dict[str, int]:
        return {**vars(self), "total": self.total}


def answer_sizes(batch: int, prompt: int, visual: int, answer: int) -> dict[str, int]:
    """Sizes of every axis of an answer's largest step, the first: nothing is merged, K = V."""
    visual = max(visual, 1)  # one row stands in where there are no pictures
    sequence = prompt + answer
    unmerged = {"K": visual, "M": sequence, "C": prompt, "views": 1}
    return {"B": batch, "P": prompt, "G": answer, "L": sequence, "V": visual, "S": answer, **unmerged}


def loop_memory(
    stages: Iterable[StageSpec], language: LanguageConfig, sizes: Mapping[str, int], weights: int
) -> DeviceMemory:
    """What a loop needs whose engines have ``stages`` and ``weights`` bytes in their plans, for an answer of ``sizes``.

    ``stages`` are with the engines' dtypes, ``sizes`` those of :func:`answer_sizes`.
    """
    held: dict[str, int] = {}
    stages = list(stages)
    for stage in stages:
        if stage.name == "rotate":  # from a layer's buffers to a layer's buffers, which are others' as well
            continue
        for profile in (STEP, PROMPT) if serves_prompt(stage) else (STEP,):
            here = prompt_sizes(sizes) if profile == PROMPT else sizes
            names = buffers(stage, profile)
            for tensor in (*stage.inputs, *stage.outputs):
                if tensor.name not in SHAPE_INPUTS:
                    name = names.get(tensor.name, tensor.name)
                    held[name] = max(held.get(name, 0), _bytes(tensor, here))
    cached = any(stage.loop == "cached" for stage in stages)
    caches = [name for name in held if _CACHE.search(name)]
    item = max(ITEM_BYTES[tensor.dtype] for stage in stages for tensor in stage.outputs if tensor.name == "hidden")
    rows = sizes["B"] * (sizes["P"] if cached else sizes["L"])
    inside = rows * (2 * language.mlp_hidden_size + 4 * language.d_model) * item
    # Scores of l* are float32, and a prompt's are made for all of its rows; elsewhere attention holds none.
    scores = 8 * sizes["B"] * language.n_heads * sizes["P"] ** 2 if cached else 0
    head = 2 * 4 * sizes["B"] * sizes["G"] * language.head_rows
    return DeviceMemory(
        weights,
        sum(held[name] for name in caches),
        sum(held.values()) - sum(held[name] for name in caches),
        max(inside, scores, head),
    )


def paper_memory(
    model: ModelConfig, merge: MergeConfig, loop: Loop, precision: str, sizes: Mapping[str, int]
) -> DeviceMemory:
    """:func:`loop_memory` of engines that are not built, in ``precision`` ("fp32", "fp16" or "bf16")."""
    item = 4 if precision == "fp32" else 2
    specs = engine_stages(stage_specs(model, merge, sizes["G"], [loop]), model, merge)
    stages = [
        StageSpec(s.name, engine_tensors(s.inputs, precision), engine_tensors(s.outputs, precision), s.loop)
        for s in specs.values()
    ]
    weights = item * sum(math.prod(shape) for shape in released_shapes(model).values())
    return loop_memory(stages, model.language, sizes, weights)


def usual_sizes(records: Iterable[EngineRecord]) -> dict[str, int]:
    """:func:`answer_sizes` of what engines were tuned for."""
    found: dict[str, int] = {}
    for record in records:
        for tensor in record.inputs:
            usual = record.profiles[STEP][tensor.name][_USUAL]
            axes = (SHAPE_INPUTS[tensor.name],) if tensor.name in SHAPE_INPUTS else tensor.axes
            found |= {axis: size for axis, size in zip(axes, usual, strict=True) if isinstance(axis, str)}
    return answer_sizes(found["B"], found["P"], found["V"], found["G"])


def engines_memory(records: Iterable[EngineRecord], language: LanguageConfig) -> DeviceMemory:
    """:func:`loop_memory` of one loop's engines as they were built, for an answer of :func:`usual_sizes`."""
    records = list(records)
    weights = sum(record.plan_bytes for record in records)
    return loop_memory([record.spec for record in records], language, usual_sizes(records), weights)


def _bytes(tensor: TensorSpec, sizes: Mapping[str, int]) -> int:
    return ITEM_BYTES[tensor.dtype] * math.prod(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes)
