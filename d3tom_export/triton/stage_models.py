"""The stages of one loop as models of their own: graphs for the server's ONNX Runtime backend, or TensorRT's plans."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from d3tom_export.backends.choice import ENGINE_BACKENDS
from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.config import Loop
from d3tom_export.engines.record import EngineRecord, Target, built_engines
from d3tom_export.engines.shapes import SHAPE_INPUTS
from d3tom_export.errors import D3tomError, listing
from d3tom_export.stages.contract import TensorSpec
from d3tom_export.triton.configs import group, tensor
from d3tom_export.triton.text_format import Message, to_text
from d3tom_export.trust.graphs import MOST_BYTES, read_graph

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
}
"""The server's names of the types that stages' tensors have."""


@dataclass(frozen=True)
class StageModel:
    """One stage."""

    name: str
    config: str
    """Its config.pbtxt."""
    file: str
    """What the server loads, ``model.onnx`` or ``model.plan``; and its name in the bundle."""
    source: str
    weights: tuple[str, ...] = field(default=())
    """Files of the bundle that lie beside it."""
    needs_plugin: bool = False
    """Whether the server must load the merge plugin for it."""


def stage_models(bundle: Bundle, loop: Loop, backend: str, precision: str | None, gpu: bool) -> list[StageModel]:
    """The models of ``loop`` for a backend. Raises :class:`D3tomError` where it has none that a server loads."""
    if backend in ENGINE_BACKENDS:
        return _plans(bundle, loop, backend, precision)
    return [_graph(bundle, name, key, gpu) for name, key in bundle.stage_keys(loop).items()]


def _graph(bundle: Bundle, name: str, key: str, gpu: bool) -> StageModel:
    """The standard graph; the server's ONNX Runtime backend knows no inputs with a default, which keep it."""
    spec = bundle.manifest.stages[key]
    graph = read_graph(bundle.read(stage_file(key), MOST_BYTES))
    inputs = tuple(each for each in spec.inputs if each.default is None)
    config = _config(name, "onnxruntime", inputs, spec.outputs, group(gpu, 1))
    weights = tuple(sorted({weight.file for weight in graph.weights}))
    return StageModel(name, config, "model.onnx", stage_file(key), weights)


def _plans(bundle: Bundle, loop: Loop, backend: str, precision: str | None) -> list[StageModel]:
    if backend != "tensorrt":
        raise D3tomError(
            f"--stages is for backends that the server has: its TensorRT loads no plans of {backend}. Leave it out: "
            "`answer` runs them; or take --backend onnxruntime."
        )
    found = {
        target: records
        for target, records in built_engines(bundle.folder, bundle.files).items()
        if target.toolkit == backend and precision in (None, target.precision)
    }
    if len(found) > 1:
        raise D3tomError(
            f"{bundle.folder} has engines of {listing(found)}: a model of the server has one plan. Choose by "
            "--precision, or leave --stages out: `answer` takes those of the GPU that it finds."
        )
    ((target, records),) = found.items()
    return [_plan(target, record) for record in records.values() if record.loop in (None, loop)]


def _plan(target: Target, record: EngineRecord) -> StageModel:
    profiles = {"profile": list(map(str, range(len(record.profiles))))} if len(record.profiles) > 1 else {}
    config = _config(record.stage, "tensorrt", record.inputs, record.outputs, group(True, 1) | profiles, SHAPE_INPUTS)
    return StageModel(
        record.stage, config, "model.plan", f"{target.folder}/{record.key}.plan", needs_plugin=record.needs_plugin
    )


def _config(
    name: str,
    backend: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    instances: Message,
    shapes: Container[str] = (),
) -> str:
    return to_text(
        {
            "name": name,
            "backend": backend,
            "max_batch_size": 0,
            "input": [{**_of(each), **({"is_shape_tensor": True} if each.name in shapes else {})} for each in inputs],
            "output": [_of(each) for each in outputs],
            "instance_group": [instances],
        }
    )


def _of(spec: TensorSpec) -> Message:
    return tensor(spec.name, _TYPES[spec.dtype], *(-1 if isinstance(axis, str) else axis for axis in spec.axes))
