"""``config.pbtxt`` of the models: tensors, instances, how a bundle is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d3tom_export.backends.choice import ENGINE_BACKENDS
from d3tom_export.stages.contract import TensorSpec
from d3tom_export.triton.serving import parameters
from d3tom_export.triton.text_format import Message, Symbol, string_map, to_text

ANSWER = "answer"
"""The name of the model that answers."""

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
}
"""The server's names of the types that stages' tensors have."""


def runs_on_gpu(backend: str, device: str) -> bool:
    """Whether a backend's work is a GPU's."""
    return backend in ENGINE_BACKENDS or device != "cpu"


def answer_config(opening: Mapping[str, Any], instances: int) -> str:
    """Of the model that answers.

    Args:
        opening: Arguments of :func:`d3tom_export.open`, ``backend`` and ``device`` among them.
        instances: How many there are, of each GPU where they run on those.
    """
    return to_text(
        {
            "name": ANSWER,
            "backend": "python",
            "max_batch_size": 0,
            "model_transaction_policy": {"decoupled": True},
            "input": [
                _tensor("IMAGE", "TYPE_STRING", -1) | {"optional": True},
                _tensor("PROMPT", "TYPE_STRING", 1),
                _tensor("PARAMS", "TYPE_STRING", 1) | {"optional": True},
            ],
            "output": [
                _tensor("TEXT", "TYPE_STRING", 1),
                _tensor("TOKENS", "TYPE_INT32", -1),
                _tensor("STEP", "TYPE_INT32", 1),
                _tensor("FINAL", "TYPE_BOOL", 1),
            ],
            "instance_group": [_group(runs_on_gpu(opening["backend"], opening["device"]), instances)],
            "parameters": string_map(parameters(opening)),
        }
    )


def stage_config(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], gpu: bool) -> str:
    """Of a stage's graph as a model of the server's ONNX Runtime backend.

    That backend knows no input with a default: such an input is left out, and has its default.
    """
    return to_text(
        {
            "name": name,
            "backend": "onnxruntime",
            "max_batch_size": 0,
            "input": [_of(tensor) for tensor in inputs if tensor.default is None],
            "output": [_of(tensor) for tensor in outputs],
            "instance_group": [_group(gpu, 1)],
        }
    )


def _group(gpu: bool, count: int) -> Message:
    return {"kind": Symbol("KIND_GPU" if gpu else "KIND_CPU"), "count": count}


def _of(tensor: TensorSpec) -> Message:
    return _tensor(tensor.name, _TYPES[tensor.dtype], *(-1 if isinstance(axis, str) else axis for axis in tensor.axes))


def _tensor(name: str, kind: str, *dims: int) -> dict[str, Any]:
    return {"name": name, "data_type": Symbol(kind), "dims": list(dims)}
