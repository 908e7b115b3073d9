"""A bundle's stages on OpenVINO beside ONNX Runtime, at LaViDa's proportions in small: what was tried and not kept.

    pip install --no-deps openvino
    python -m benchmarks.cpu_openvino [--repeats N] [--json FILE]

OpenVINO reads the standard graphs, once with the products in float32 and once in bfloat16, which processors with AMX
multiply several times as fast; it cannot read all of them. Beside it stand the graphs for the CPU on ONNX Runtime, in
float32 and int8. The ways to run a stage take turns, with a pause between them and a call that does not count, so that
the threads of the one before are no longer at work.
"""

from __future__ import annotations

import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort

from benchmarks.cpu_graphs import bound, stage_inputs, table
from benchmarks.loops import machine
from benchmarks.proportions import LAVIDA, SMALL, Proportions, build
from d3tom_export.backends.onnxruntime_stage import session_options
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.config import LOOPS
from d3tom_export.cpu.place import CPU_PRECISIONS, UNTUNED, tuned_graph
from d3tom_export.process import claim
from d3tom_export.stages.contract import StageSpec

HINTS = {"OpenVINO fp32": "f32", "OpenVINO bf16": "bf16"}
WAYS = [*(f"ONNX Runtime {precision}" for precision in CPU_PRECISIONS), *HINTS]

_PAUSE = 0.05
"""Seconds between the turns."""


def openvino() -> Any:
    """The module. Raises :class:`click.ClickException` where it is missing."""
    try:
        return importlib.import_module("openvino")
    except ImportError:
        raise click.ClickException("OpenVINO is not installed. pip install --no-deps openvino") from None


def on_onnxruntime(
    bundle: Bundle, key: str, precision: str, inputs: Mapping[str, ort.OrtValue], spec: StageSpec
) -> Callable[[], object]:
    """A call of the stage's graph for the CPU."""
    content = tuned_graph(bundle.folder, precision, key).read_bytes()
    options = session_options("cpu", bundle.folder)
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    binding = bound(session, spec, inputs)
    return lambda: session.run_with_iobinding(binding)


def on_openvino(
    bundle: Bundle, key: str, hint: str, inputs: Mapping[str, ort.OrtValue]
) -> tuple[Callable[[], object] | None, str]:
    """A call of the stage's standard graph with the precision ``hint``; None where it cannot be read, and why."""
    ov = openvino()
    core = ov.Core()
    try:
        compiled = core.compile_model(
            core.read_model(str(bundle.folder / stage_file(key))),
            "CPU",
            {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"},
        )
    except RuntimeError as error:
        return None, " ".join(str(error).split())
    request = compiled.create_infer_request()
    wanted = {name for port in compiled.inputs for name in port.get_names()}
    # NumPy's two names for integers of eight bytes are one type to it, but not to OpenVINO.
    arrays = {name: value.numpy() for name, value in inputs.items() if name in wanted}
    arrays = {name: each.view(np.int64) if each.dtype.kind == "i" else each for name, each in arrays.items()}
    for name, each in arrays.items():
        request.set_tensor(name, ov.Tensor(each, shared_memory=True))

    def call(_: object = arrays) -> object:  # which holds the memory that is shared
        return request.infer()

    return call, ""


def measure(bundle: Bundle, sizes: Proportions, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by stage and way; a stage that OpenVINO cannot read lacks its ways."""
    found: dict[str, dict[str, float]] = {}
    for key, spec in bundle.manifest.stages.items():
        if spec.name in UNTUNED:
            continue
        inputs = stage_inputs(spec, sizes)
        calls: dict[str, Callable[[], object]] = {
            f"ONNX Runtime {precision}": on_onnxruntime(bundle, key, precision, inputs, spec)
            for precision in CPU_PRECISIONS
        }
        for way, hint in HINTS.items():
            call, problem = on_openvino(bundle, key, hint, inputs)
            if call is not None:
                calls[way] = call
            else:
                click.echo(f"{way} cannot read {key}: {problem[:300]}", err=True)
        for call in calls.values():
            call()
        times: dict[str, list[float]] = {way: [] for way in calls}
        for _ in range(repeats):
            for way, call in calls.items():
                time.sleep(_PAUSE)
                call()  # wakes the threads up
                start = time.perf_counter()
                call()
                times[way].append(1000 * (time.perf_counter() - start))
        found[key] = {way: statistics.median(taken) for way, taken in times.items()}
    return found


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=15, show_default=True, help="Runs of each.")
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that all of it runs, not how fast.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the medians as JSON.")
def main(repeats: int, quick: bool, json_file: Path | None) -> None:
    """Measure and print a Markdown table."""
    openvino()
    sizes = SMALL if quick else LAVIDA
    with tempfile.TemporaryDirectory() as scratch:
        bundle = load_bundle(build(Path(scratch), sizes.merge, sizes.generation, LOOPS, sizes.config))
        found = measure(bundle, sizes, repeats)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine(), "ms": found}, indent=2) + "\n", encoding="utf-8")
    click.echo(table(found, WAYS))


if __name__ == "__main__":
    claim()
    main()
