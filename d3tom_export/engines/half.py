"""A bundle's stages in half precision for ONNX Runtime: the graphs that engines are built from, and no engines.

The pass is the engines' own (engines/precision.py), the merge stands in them as standard operators, and every input is
a real one. So any runtime that knows standard operators can take them.
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
        graph = engine_graph(folder / f"{key}.onnx", stage, precision, "onnx")
        target = folder / half_file(precision, key)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent.resolve() != folder.resolve() / target.parent.relative_to(folder):
            raise D3tomError(f"{target.parent} is a link that leads out of {folder}. Remove it and run this again.")
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        write_file(partial, graph.model)
        partial.replace(target)
