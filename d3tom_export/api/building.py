"""A bundle built from Python: what ``d3tom-export build`` does, with the same refusals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d3tom_export.api.settings import LoopSettings, check_names, generation_changes
from d3tom_export.config import (
    LOOPS,
    Aggregation,
    CacheMergeConfig,
    Deciders,
    MergeAt,
    MergeConfig,
    MergedPositions,
    MergeSchedule,
    QuantFormat,
    Remerge,
    SelectionPolicy,
)
from d3tom_export.errors import CallError, listing
from d3tom_export.export.build import BuildResult
from d3tom_export.export.build import build as build_bundle
from d3tom_export.export.request import (
    BuildRequest,
    EngineRequest,
    ModelSource,
    RandomWeights,
    StageRequest,
    WeightsMode,
)
from d3tom_export.progress import Note, Progress, no_note, no_progress
from d3tom_export.quantize.plan import QuantizeRequest

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from d3tom_export.engines.precision import Accumulation
    from d3tom_export.engines.record import MergeOp
    from d3tom_export.engines.shapes import Range
    from d3tom_export.engines.toolkit import ToolkitName

    Sizes = int | tuple[int, int, int]
    """Of an axis that engines serve: one size, or the smallest, the most common and the largest."""

_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_KV_CACHES = (False, True, "both")


def build(
    model: str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    layer: int = 3,
    ratio: float = 0.8,
    schedule: MergeSchedule = "adaptive",
    select: SelectionPolicy = "decider",
    deciders: Deciders = "committed",
    aggregate: Aggregation = "sum",
    positions: MergedPositions = "compact",
    kv_cache: bool | Literal["both"] = False,
    merge_at: MergeAt = "step",
    remerge: Remerge = "every-step",
    cached_adaptive: bool = False,
    restore_norm: bool = True,
    text_targets: bool = True,
    share_prefix: bool = False,
    geometry: str | None = None,
    vision_tower: str | os.PathLike[str] | None = None,
    weights: WeightsMode | RandomWeights | None = None,
    quantize: QuantFormat | QuantizeRequest | None = None,
    clip_vocabulary: bool = True,
    drop_newline: bool = True,
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32",
    engine: ToolkitName | None = None,
    sm: int | Sequence[int] = (),
    merge_op: MergeOp = "plugin",
    accumulate: Accumulation = "fp32",
    visual_tokens: Sizes | None = None,
    text_tokens: Sizes | None = None,
    answer_tokens: Sizes | None = None,
    batch: Sizes | None = None,
    optimization_level: int | None = None,
    workspace_mib: int | None = None,
    self_check: int | None = None,
    max_memory: int | None = None,
    progress: Progress = no_progress,
    note: Note = no_note,
    **generation: Unpack[LoopSettings],
) -> BuildResult:
    """Patch a checkpoint with D3ToM and export it to a bundle of ONNX stages. Needs the ``build`` extra.

    The arguments mean what ``d3tom-export build --help`` says of the options of these names; their defaults are theirs.
    The bundle is written beside its place and renamed when it is complete: nothing is left behind where it fails. A
    bundle that does not pass its self-check is returned all the same, and its ``passed`` is False.

    Args:
        model: The checkpoint's folder. None: the bundled model's, or none where there is a ``geometry``.
        output: The bundle's folder. None: one in the current folder, named for the model and its merging.
        force: Replace the output where it is a bundle.
        layer: l*, from 0.
        ratio: In [0, 1).
        schedule, select, deciders, aggregate, positions: How visual tokens merge.
        kv_cache: The loops to build: without a cache, with one (True), or "both".
        merge_at, remerge, cached_adaptive, restore_norm, text_targets, share_prefix: Of the loop with a KV cache.
        geometry: The name of a model's size, with random weights instead of a checkpoint's.
        vision_tower: The folder of a tower for a checkpoint that was saved without its own.
        weights: "link", "copy" or "float16" of a checkpoint's, "random" or "sparse" of a geometry's.
        quantize: Weights in few bits: a format, or all of a request.
        clip_vocabulary, drop_newline: Quirks of the release.
        precision: Of the engines; without any, of graphs for ONNX Runtime beside those in float32.
        engine: "tensorrt" or "tensorrt-rtx"; None builds no engines, and nothing down to ``workspace_mib`` applies.
        sm: Compute capabilities, as 89. Empty: of the GPU at hand.
        merge_op, accumulate, optimization_level, workspace_mib: How engines are built.
        visual_tokens, text_tokens, answer_tokens, batch: Sizes that engines serve.
        self_check: Samples to validate. None: 2 where memory holds the model in float32, else 0.
        max_memory: Bytes that the export and the self-check may take. None: what is free.
        progress: Called as (what, parts done, parts in all).
        note: Called with sentences for the user.
        **generation: How the bundle answers: :class:`~d3tom_export.api.settings.LoopSettings`.

    Raises :class:`~d3tom_export.errors.D3tomError` for what does not fit together, the model, the machine or what is
    there; :class:`TypeError` for a keyword that there is not.
    """
    given: dict[str, Any] = dict(generation)
    check_names(given, LoopSettings.__annotations__)
    for name, value, known in (("kv_cache", kv_cache, _KV_CACHES), ("precision", precision, _PRECISIONS)):
        if value not in known:
            raise CallError(f"{name} is {value!r}, expected one of {listing(map(repr, known))}.")
    sizes = {"visual_tokens": visual_tokens, "text_tokens": text_tokens, "answer_tokens": answer_tokens, "batch": batch}
    of_engines: dict[str, Any] = {
        "sms": (sm,) if isinstance(sm, int) else tuple(sm),
        "merge_op": merge_op,
        "accumulate": accumulate,
        "ranges": {name: None if size is None else _range(size) for name, size in sizes.items()},
        "optimization_level": optimization_level,
        "workspace_mib": workspace_mib,
    }
    engines = None
    if engine is not None:
        engines = EngineRequest.of(engine, precision, **of_engines)
    elif of_engines != _NO_ENGINES:
        idle = [name for name, value in of_engines.items() if value != _NO_ENGINES[name]]
        raise CallError(f"{listing(idle)} concerns engines, and engine=None builds none.")
    cache = CacheMergeConfig(cached_adaptive, restore_norm, text_targets, remerge)
    merge = MergeConfig(
        layer, ratio, schedule, select, aggregate, positions, cache, merge_at=merge_at, deciders=deciders
    )
    stages = StageRequest(
        merge,
        LOOPS if kv_cache == "both" else ("cached",) if kv_cache else ("uncached",),
        (precision,) if engines is None and precision != "fp32" else (),
        drop_newline,
        share_prefix,
        QuantizeRequest(quantize) if isinstance(quantize, str) else quantize,
    )
    source = ModelSource(_path(model), geometry, weights, clip_vocabulary, _path(vision_tower))
    changes = generation_changes(given)
    request = BuildRequest(source, stages, _path(output), force, changes, engines, self_check, max_memory)
    return build_bundle(request, progress, note)


_NO_ENGINES: dict[str, Any] = {
    "sms": (),
    "merge_op": "plugin",
    "accumulate": "fp32",
    "ranges": dict.fromkeys(("batch", "visual_tokens", "text_tokens", "answer_tokens")),
    "optimization_level": None,
    "workspace_mib": None,
}


def _path(path: str | os.PathLike[str] | None) -> Path | None:
    return None if path is None else Path(path)


def _range(sizes: Sizes) -> Range:
    from d3tom_export.engines.shapes import Range

    return (Range(sizes, sizes, sizes) if isinstance(sizes, int) else Range(*sizes)).checked()
