"""A bundle's stages in half precision for ONNX Runtime, by the pass that the graphs of engines go through.

Scores, norms, softmax and merge sums stay float32 (engines/precision.py), the merge stands in them as standard
operators, and every input is a real one. So any runtime that knows standard operators can take them. Products are
plain ones of half precision: ONNX Runtime's CUDA kernels add their terms up in float32 unless they are told otherwise,
and float32 products between casts, which TensorRT fuses, would be slow ones there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from d3tom_export.bundle.half import HalfPrecision, half_file
from d3tom_export.engines.graph import engine_graph
from d3tom_export.stages.contract import StageSpec
from d3tom_export.trust.replace import replace_inside


def write_half(folder: Path, stages: Mapping[str, StageSpec], precision: HalfPrecision) -> None:
    """Write the graph in ``precision`` of every one of ``stages``, by key, of the bundle in ``folder``.

    One that is there is replaced (:func:`replace_inside`). No weight is read, and none is stored again. The caller
    writes the manifest afterwards.
    """
    for key, stage in stages.items():
        graph = engine_graph(folder / f"{key}.onnx", stage, precision, "onnx", accumulate="any")
        replace_inside(folder, half_file(precision, key), graph.model)
