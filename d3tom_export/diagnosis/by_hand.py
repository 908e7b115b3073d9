"""What repeats a diagnosis with NVIDIA's own tools: the inputs of the call that departed, and the command for them.

Engines show no inner values unless they are rebuilt with those marked as outputs, which Polygraphy does. Polygraphy is
not needed here otherwise, see docs/diagnosis.md.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from d3tom_export.diagnosis.compare import LAYER_TOLERANCE
from d3tom_export.diagnosis.graph import StageGraph
from d3tom_export.diagnosis.report import Diagnosis
from d3tom_export.errors import D3tomError

PLUGIN_LIBRARY = "libd3tom_export_plugin.so"
"""The C++ library of the merge plugin (plugins/cpp), which NVIDIA's programs load."""

_LOADER = '''"""Polygraphy's data loader: one call of stage {stage}, {where}."""

from pathlib import Path

import numpy as np


def load_data():
    with np.load(Path(__file__).with_name("{name}.npz")) as inputs:
        yield dict(inputs)
'''


def save_inputs(diagnosis: Diagnosis, folder: Path) -> Path | None:
    """Write what the first bad stage was called with, and a loader for it; returns the loader, None if nothing departs.

    Floats are written in the precision of the graph that was looked into, which is what its engine takes.
    Raises :class:`D3tomError` where they cannot be written.
    """
    first = diagnosis.first
    if first is None:
        return None
    inputs = first.inputs
    if diagnosis.descent is not None:
        inputs = StageGraph(diagnosis.descent.graph).typed(inputs)
    script = folder / f"{first.stage}_inputs.py"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{first.stage}.npz", **inputs)  # type: ignore[arg-type]  # numpy's stub
        script.write_text(_LOADER.format(stage=first.stage, where=first.where, name=first.stage), encoding="utf-8")
    except OSError as error:
        raise D3tomError(f"The inputs cannot be written to {folder}: {error}. Give another folder.") from None
    return script


def polygraphy_command(diagnosis: Diagnosis, loader: Path | None) -> str | None:
    """The ``polygraphy run`` command that compares TensorRT with ONNX Runtime inside the first bad stage.

    None where nothing departs or no engine was diagnosed. It marks the residual stream between blocks as outputs, or
    the value that departs in the graph too. ``loader`` is what :func:`save_inputs` wrote; None leaves its place open.
    """
    first, descent = diagnosis.first, diagnosis.descent
    if first is None or descent is None or not diagnosis.backend.startswith("tensorrt"):
        return None
    rtx = diagnosis.backend == "tensorrt-rtx"
    marked = descent.stream if descent.kind in ("backend", "accumulated") else [descent.value]
    shapes = [f"{name}:[{','.join(map(str, array.shape))}]" for name, array in first.inputs.items()]
    tolerance = str(LAYER_TOLERANCE[diagnosis.precision])
    command = ["polygraphy", "run", str(descent.graph), "--trt"]
    command += [] if rtx else ["--strongly-typed"]
    if marked:
        command += ["--trt-outputs", *marked]
    if first.stage.endswith("merge") and descent.graph.stem.endswith("-plugin"):
        # Only TensorRT knows the plugin, so there is nothing beside it to compare with.
        command += ["--plugins", PLUGIN_LIBRARY, "--validate"]
    else:
        command += ["--onnxrt", *(["--onnx-outputs", *marked] if marked else [])]
        command += ["--rtol", tolerance, "--atol", tolerance]
    for which in ("min", "opt", "max"):
        command += [f"--trt-{which}-shapes", *shapes]
    command += ["--data-loader-script", str(loader) if loader else "INPUTS.py"]
    return ("POLYGRAPHY_USE_TENSORRT_RTX=1 " if rtx else "") + shlex.join(command)
