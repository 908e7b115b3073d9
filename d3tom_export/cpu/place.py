"""Where a bundle keeps its graphs for ONNX Runtime on the CPU. Imports nothing: running a bundle needs no onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

CPU_FOLDER = "cpu"

CpuPrecision = Literal["fp32", "int8"]
CPU_PRECISIONS: tuple[CpuPrecision, ...] = get_args(CpuPrecision)

UNTUNED = frozenset(("vision", "embed", "certainty", "candidates"))
"""Stages without a tuned graph: they run once an answer, only look rows up, or hold nothing that is rewritten.

One whose weights are in float4 has a graph beside the tuned ones all the same: the CPU has no kernel for those."""


def with_library(precision: str) -> str:
    """The name beside that precision's of graphs that have merges of caches by a node, for a library's kernel."""
    return f"{precision}-library"


def tuned_file(precision: str, stage_key: str) -> str:
    """The name in a bundle of a stage's tuned graph, whether it has it or not."""
    return f"{CPU_FOLDER}/{precision}/{stage_key}.onnx"


def tuned_graph(bundle_folder: Path, precision: str, stage_key: str) -> Path:
    """The file of a stage's tuned graph, whether it is there or not.

    Its external data lie in ``bundle_folder``, not beside it: ONNX Runtime opens it from bytes and is told the folder.
    """
    return bundle_folder / tuned_file(precision, stage_key)
