"""A bundle's stages in half precision for ONNX Runtime, by the pass that the graphs of engines go through.

Scores, norms, softmax and merge sums stay float32 (engines/precision.py), the merge stands in them as standard
operators, and every input is a real one. So any runtime that knows standard operators can take them. Products are
plain ones of half precision: ONNX Runtime's CUDA kernels add their terms up in float32 unless they are told otherwise,
and float32 products between casts, which TensorRT fuses, would be slow ones there.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

from d3tom_export.engines.graph import engine_graph
from d3tom_export.errors import D3tomError
from d3tom_export.half import HalfPrecision, half_file
from d3tom_export.stages.contract import StageSpec
from d3tom_export.trust.files import write_file


def write_half(folder: Path, stages: Mapping[str, StageSpec], precision: HalfPrecision) -> None:
    """Write the graph in ``precision`` of every one of ``stages``, by key, of the bundle in ``folder``.

    One that is there is replaced, never written into: it may be a link, or have another name elsewhere. No weight is
    read, and none is stored again. The caller writes the manifest afterwards.
    """
    for key, stage in stages.items():
        graph = engine_graph(folder / f"{key}.onnx", stage, precision, "onnx", accumulate="any")
        target = folder / half_file(precision, key)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent.resolve() != folder.resolve() / target.parent.relative_to(folder):
            raise D3tomError(f"{target.parent} is a link that leads out of {folder}. Remove it and run this again.")
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        write_file(partial, graph.model)
        partial.replace(target)
