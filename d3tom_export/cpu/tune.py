"""A stage's graph to its tuned one: every pattern that must be there is found, or the build fails.

Weights stay where they are, in the bundle's safetensors files; a tuned graph is a few hundred kilobytes beside them.
What each rewrite gains is measured in docs/cpu.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir

from d3tom_export.config import LanguageConfig, MergeConfig
from d3tom_export.cpu.cache_merge import fold_cache_merges
from d3tom_export.cpu.fuse import fuse_attention, fuse_norms, fuse_products, fuse_rotary
from d3tom_export.cpu.int8 import quantize_products
from d3tom_export.cpu.merge import inline_merges, select_by_topk
from d3tom_export.cpu.place import UNTUNED, CpuPrecision, tuned_file, with_library
from d3tom_export.cpu.spell import spell_out_float4
from d3tom_export.errors import D3tomError, listing
from d3tom_export.stages.contract import StageSpec
from d3tom_export.stages.edit import MICROSOFT, drop_unused
from d3tom_export.trust.replace import replace_inside

OPSET = 23
"""The first with Attention and RMSNormalization."""


@dataclass(frozen=True)
class Patterns:
    """How often each rewrite applied to a stage."""

    norms: int = 0
    rotaries: int = 0
    attentions: int = 0
    selections: int = 0
    merges: int = 0
    products: int = 0
    """With weights."""
    cache_merges: int = 0


def expected_patterns(
    stage: StageSpec, language: LanguageConfig, merge: MergeConfig, *, for_library: bool = False
) -> Patterns:
    """What a stage of this model must contain; ``for_library``: with the merges of caches as nodes of their own."""
    layers, later = language.n_layers, language.n_layers - merge.layer - 1
    cached = stage.loop == "cached"
    if stage.name == "front":
        blocks = merge.layer
        return Patterns(2 * blocks, 2 * blocks, blocks, products=7 * blocks)
    if stage.name == "back":
        return Patterns(2 * later + 1, 2 * later, later, products=(7 * later + 1))
    if stage.name in ("prefill", "extend", "prompt_front", "prompt_back"):
        blocks = {"prompt_front": merge.layer + 1, "prompt_back": later}.get(stage.name, layers)
        # with a row shift the last layer and the head are for one row, whose rotary embedding stays as it is
        if language.row_shift and stage.name != "prompt_front":
            return Patterns(2 * blocks + 1, 2 * blocks - 1, blocks - 1, products=(7 * blocks + 1))
        # the last layer ends at its keys and values
        return Patterns(2 * blocks - 1, 2 * blocks - 2, blocks - 1, products=(7 * blocks - 5))
    if stage.name == "prompt_merge":
        return Patterns(2, 2, 1, 0, 1, 7)
    if stage.name == "rotate":
        return Patterns(rotaries=1)
    products = 7
    if cached:  # l* keeps its attention in parts, which give the scores
        caches = later if stage.name == "merge" else 0
        folded = caches if for_library else 0
        return Patterns(2, 2 + caches, 0, 1, caches - folded, products, folded)
    return Patterns(2, 2, 1, 1, int(merge.select == "decider"), products)


def has_cache_merges(stage: StageSpec, merge: MergeConfig) -> bool:
    """Whether a graph for the merge's library can be made of ``stage``: it restores norms, too."""
    return stage.loop == "cached" and stage.name == "merge" and merge.cache.restore_norm


def tune(
    path: Path,
    stage: StageSpec,
    language: LanguageConfig,
    merge: MergeConfig,
    precision: CpuPrecision,
    *,
    for_library: bool = False,
) -> ir.Model:
    """The standard graph at ``path`` rewritten for ONNX Runtime on the CPU. Reads no weight.

    ``for_library`` makes one that has merges of caches as nodes (:mod:`d3tom_export.cpu.cache_merge`); ONNX Runtime
    takes longer to load it than one in which they are inlined, so it is for sessions with the library alone.

    Raises :class:`D3tomError` where a pattern is missing or found more often than the model has it.
    """
    model = ir.load(path)
    model.graph.opset_imports[""] = OPSET
    model.graph.opset_imports[MICROSOFT] = 1
    found = Patterns(
        selections=select_by_topk(model),
        cache_merges=fold_cache_merges(model) if for_library else 0,
        merges=inline_merges(model),
        norms=fuse_norms(model),
        rotaries=fuse_rotary(model),
        attentions=fuse_attention(model, language),
        products=quantize_products(model) if precision == "int8" else fuse_products(model),
    )
    wanted = expected_patterns(stage, language, merge, for_library=for_library)
    differing = [
        f"{name} {count} (expected {asdict(wanted)[name]})"
        for name, count in asdict(found).items()
        if count != asdict(wanted)[name]
    ]
    if differing:
        raise D3tomError(
            f"Stage {path.stem} cannot be tuned for the CPU: found {listing(differing)}. This is a defect of the "
            "rewriting, not of the checkpoint; please report it with the versions of torch and onnxscript."
        )
    spell_out_float4(model)
    drop_unused(model)
    model.doc_string = f"D3ToM stage: {stage.name}, for ONNX Runtime on the CPU, {precision}"
    return model


def _spelled(path: Path) -> ir.Model | None:
    """The standard graph at ``path``, which nothing tunes, for a CPU that has no float4; None where it holds none."""
    model = ir.load(path)
    if not spell_out_float4(model):
        return None
    drop_unused(model)
    return model


def write_tuned(
    folder: Path,
    stages: Mapping[str, StageSpec],
    language: LanguageConfig,
    merge: MergeConfig,
    precision: CpuPrecision = "fp32",
) -> None:
    """Write the tuned graph of every one of ``stages``, by key, of the bundle in ``folder``.

    One that is there is replaced (:func:`replace_inside`). The caller writes the manifest afterwards.
    """
    for key, stage in stages.items():
        path = folder / f"{key}.onnx"
        model = _spelled(path) if stage.name in UNTUNED else tune(path, stage, language, merge, precision)
        if model is None:
            continue
        _write(folder, tuned_file(precision, key), model)
        if has_cache_merges(stage, merge):
            model = tune(path, stage, language, merge, precision, for_library=True)
            _write(folder, tuned_file(with_library(precision), key), model)


def _write(folder: Path, name: str, model: ir.Model) -> None:
    replace_inside(folder, name, ir.to_proto(model).SerializeToString(deterministic=True))
