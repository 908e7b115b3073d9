"""What repeats a diagnosis with NVIDIA's own tools: the inputs of the call that departed, and the command for them.

Engines show no inner values unless they are rebuilt with those marked as outputs, which Polygraphy does. Polygraphy is
not needed here otherwise, see docs/diagnosis.md.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from d3tom_export.diagnosis.report import Diagnosis
from d3tom_export.errors import D3tomError

_LOADER = '''"""Polygraphy's data loader: one call of stage {stage}, {where}."""

from pathlib import Path

import numpy as np


def load_data():
    with np.load(Path(__file__).with_name("{name}.npz")) as inputs:
        yield dict(inputs)
'''


def save_inputs(diagnosis: Diagnosis, folder: Path) -> Path | None:
    """Write what the first bad stage was called with, and a loader for it; returns the loader, None if nothing departs.

    Raises :class:`D3tomError` where they cannot be written.
    """
    first = diagnosis.first
    if first is None:
        return None
    script = folder / f"{first.stage}_inputs.py"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{first.stage}.npz", **first.inputs)  # type: ignore[arg-type]  # numpy's stub
        script.write_text(_LOADER.format(stage=first.stage, where=first.where, name=first.stage), encoding="utf-8")
    except OSError as error:
        raise D3tomError(f"The inputs cannot be written to {folder}: {error}. Give another folder.") from None
    return script


def polygraphy_command(diagnosis: Diagnosis, rtx: bool, loader: Path | None) -> str | None:
    """The ``polygraphy run`` command that compares TensorRT with ONNX Runtime inside the first bad stage.

    None where nothing departs. It marks the residual stream between blocks, or the value that departs here too.
    ``loader`` is what :func:`save_inputs` wrote; None leaves its place in the command open.
    """
    first, descent = diagnosis.first, diagnosis.descent
    if first is None or descent is None:
        return None
    marked = descent.stream if descent.kind in ("backend", "accumulated") else [descent.value]
    tolerance = next(iter(first.outputs.values())).tolerance
    shapes = [f"{name}:[{','.join(map(str, array.shape))}]" for name, array in first.inputs.items()]
    command = ["polygraphy", "run", str(descent.graph), "--onnxrt", "--trt"]
    if marked:
        command += ["--onnx-outputs", *marked, "--trt-outputs", *marked]
    for which in ("min", "opt", "max"):
        command += [f"--trt-{which}-shapes", *shapes]
    command += ["--data-loader-script", str(loader) if loader else "INPUTS.py", "--rtol", str(tolerance)]
    command += ["--atol", str(tolerance)]
    return ("POLYGRAPHY_USE_TENSORRT_RTX=1 " if rtx else "") + shlex.join(command)
