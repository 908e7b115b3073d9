"""What a bundle that is there may be given later: engines, and graphs for ONNX Runtime in further precisions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d3tom_export.bundle.folder import Bundle, listed_files, load_bundle, write_manifest
from d3tom_export.bundle.output import clear_half_written, locked, unlist
from d3tom_export.cpu.tune import write_tuned
from d3tom_export.engines.build import EngineOptions, StageOutcome, build_engines
from d3tom_export.engines.half import write_half
from d3tom_export.errors import D3tomError
from d3tom_export.export.request import NO_HALF_FLOAT4, QUANTIZED_TWICE, EngineRequest, GraphPrecision
from d3tom_export.progress import Progress, no_progress


@dataclass(frozen=True)
class BuiltEngines:
    """What a build of engines was set to, and what became of each stage's."""

    bundle: Bundle
    options: EngineOptions
    outcomes: list[StageOutcome]

    def to_json(self) -> dict[str, Any]:
        return {
            "sizes": self.options.shapes.to_json(),
            "engines": [outcome.to_json() for outcome in self.outcomes],
        }


def build_engines_of(
    bundle: Bundle, request: EngineRequest, progress: Progress = no_progress, previous: Path | None = None
) -> BuiltEngines:
    """Give ``bundle`` the engines that ``request`` asks for (:func:`~d3tom_export.engines.build.build_engines`)."""
    options = request.options(bundle.config, bundle.manifest.generation)
    outcomes = build_engines(bundle, request.targets, options, previous=previous, progress=progress)
    return BuiltEngines(bundle, options, outcomes)


def add_engines(folder: Path, request: EngineRequest, progress: Progress = no_progress) -> BuiltEngines:
    """Give the bundle in ``folder`` engines. Raises :class:`D3tomError`, as loading it and building them do."""
    return build_engines_of(load_bundle(folder), request, progress)


def add_graphs(folder: Path, precision: GraphPrecision) -> None:
    """Give the bundle in ``folder`` graphs for ONNX Runtime in ``precision``, in the place of any it has.

    They are not validated, but loaded where the CPU can. Raises :class:`D3tomError` where that fails.
    """
    from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend

    bundle = load_bundle(folder)
    manifest = bundle.manifest
    if precision == "int8" and manifest.formats:
        raise D3tomError(QUANTIZED_TWICE)
    if precision != "int8" and not manifest.standard_on_cpu:
        raise D3tomError(NO_HALF_FLOAT4)
    with locked(folder) as alone:
        if alone:
            clear_half_written(folder)
        unlist(folder, lambda name: f"/{precision}/" in name)
        known = listed_files(folder)
        if precision == "int8":
            write_tuned(folder, manifest.stages, bundle.config.language, manifest.merge, precision)
        else:
            write_half(folder, manifest.stages, precision)
        bundle = replace(bundle, files=write_manifest(folder, manifest, known))
    bundle.check_graphs()
    for loop in manifest.loops if precision != "bf16" else ():  # whether they load is seen now, where the CPU can
        OnnxRuntimeBackend(bundle, loop, device="cpu", precision=precision)
