"""The device memory that a loop's engines need: weights, and the buffers that lie between them.

On paper, from sizes alone; what CUDA and TensorRT take for themselves (contexts, kernels, persistent state) comes on
top. B batch, P prompt, G answer tokens, V visual tokens, C = P - V + K rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from d3tom_export.checkpoint.tensors import product_shapes, released_shapes
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
from d3tom_export.merging.schedule import kept_at_prefill
from d3tom_export.quantize.plan import QuantizeRequest, plan_of, stored_bytes
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
    """Keys and values: 4*B*P*N*d elements a layer in the loop with a KV cache, none in the other. Of a bundle that
    merges its prompt at the prefill 4*B*C*N*d a layer behind l*; an answer that merges nothing there needs P too."""
    buffers: int
    """The other tensors that stages hand on."""
    activations: int
    """Of the stage that needs most, an estimate: what is alive at once inside it."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.buffers + self.activations

    def to_json(self) -> dict[str, int]:
        return {**vars(self), "total": self.total}


def answer_sizes(batch: int, prompt: int, visual: int, answer: int, keep: int | None = None) -> dict[str, int]:
    """Sizes of every axis of an answer's largest step, the first: nothing is merged, K = V.

    ``keep`` is K where a prompt is merged at its prefill, before that step.
    """
    visual = max(visual, 1)  # one row stands in where there are no pictures
    keep, sequence = visual if keep is None else keep, prompt + answer
    merged = {"K": keep, "M": sequence - visual + keep, "C": prompt - visual + keep, "views": 1}
    return {"B": batch, "P": prompt, "G": answer, "L": sequence, "V": visual, "S": answer, **merged}


def loop_memory(
    stages: Iterable[StageSpec], language: LanguageConfig, sizes: Mapping[str, int], weights: int
) -> DeviceMemory:
    """What a loop needs whose engines have ``stages`` and ``weights`` bytes in their plans, for an answer of ``sizes``.

    ``stages`` are with the engines' dtypes, ``sizes`` those of :func:`answer_sizes`.
    """
    held: dict[str, int] = {}
    stages = list(stages)
    merges_prompt = any(stage.name == "prompt_merge" for stage in stages)
    for stage in stages:
        if stage.name == "rotate":  # from a layer's buffers to a layer's buffers, which are others' as well
            continue
        if stage.name == "merge" and merges_prompt:  # no step merges the caches then
            continue
        for profile in (STEP, PROMPT) if serves_prompt(stage) else (STEP,):
            rows = sizes["C"] if merges_prompt and stage.name == "back" else sizes["P"]
            here = prompt_sizes({**sizes, "P": rows}) if profile == PROMPT else sizes
            names = buffers(stage, profile, merges_prompt=merges_prompt)
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
    model: ModelConfig,
    merge: MergeConfig,
    loop: Loop,
    precision: str,
    sizes: Mapping[str, int],
    quantize: QuantizeRequest | None = None,
) -> DeviceMemory:
    """:func:`loop_memory` of engines that are not built, in ``precision`` ("fp32", "fp16" or "bf16").

    ``quantize`` are weights in few bits. ``sizes`` are those of :func:`answer_sizes` with K = V; what ``merge`` merges
    at the prefill is taken off them.
    """
    item = 4 if precision == "fp32" else 2
    specs = engine_stages(stage_specs(model, merge, sizes["G"], [loop]), model, merge)
    stages = [
        StageSpec(s.name, engine_tensors(s.inputs, precision), engine_tensors(s.outputs, precision), s.loop)
        for s in specs.values()
    ]
    shapes = released_shapes(model)
    bytes_of = {name: item * math.prod(shape) for name, shape in shapes.items()}
    if quantize is not None:
        products = product_shapes(model)
        for name in plan_of(products, quantize).blocks:
            outputs, inputs = products[name]
            bytes_of[name] = stored_bytes(quantize, outputs, inputs, item) or bytes_of[name]
    weights = sum(bytes_of.values())
    own = merge.in_loop(loop == "cached")
    if own.merge_at == "prefill":
        weights += sum(size for name, size in bytes_of.items() if f".blocks.{merge.layer}." in name)  # `prompt_merge`'s
        sizes = answer_sizes(sizes["B"], sizes["P"], sizes["V"], sizes["G"], kept_at_prefill(own, sizes["V"]))
    return loop_memory(stages, model.language, sizes, weights)


def usual_sizes(records: Iterable[EngineRecord]) -> dict[str, int]:
    """:func:`answer_sizes` of what engines were tuned for."""
    found: dict[str, int] = {}
    records = list(records)
    for record in records:
        for tensor in record.inputs:
            usual = record.profiles[STEP][tensor.name][_USUAL]
            axes = (SHAPE_INPUTS[tensor.name],) if tensor.name in SHAPE_INPUTS else tensor.axes
            found |= {axis: size for axis, size in zip(axes, usual, strict=True) if isinstance(axis, str)}
    merges_prompt = any(record.stage == "prompt_merge" for record in records)
    return answer_sizes(found["B"], found["P"], found["V"], found["G"], found["K"] if merges_prompt else None)


def engines_memory(records: Iterable[EngineRecord], language: LanguageConfig) -> DeviceMemory:
    """:func:`loop_memory` of one loop's engines as they were built, for an answer of :func:`usual_sizes`."""
    records = list(records)
    weights = sum(record.plan_bytes for record in records)
    return loop_memory([record.spec for record in records], language, usual_sizes(records), weights)


def _bytes(tensor: TensorSpec, sizes: Mapping[str, int]) -> int:
    return ITEM_BYTES[tensor.dtype] * math.prod(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes)
