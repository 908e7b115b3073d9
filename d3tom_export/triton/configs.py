"""``config.pbtxt`` of the model that answers: tensors, instances, how the bundle is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d3tom_export.backends.choice import ENGINE_BACKENDS
from d3tom_export.triton.serving import parameters
from d3tom_export.triton.text_format import Symbol, string_map, to_text

ANSWER = "answer"
"""The name of the model that answers."""


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
                tensor("IMAGE", "TYPE_STRING", -1) | {"optional": True},
                tensor("PROMPT", "TYPE_STRING", 1),
                tensor("PARAMS", "TYPE_STRING", 1) | {"optional": True},
            ],
            "output": [
                tensor("TEXT", "TYPE_STRING", 1),
                tensor("TOKENS", "TYPE_INT32", -1),
                tensor("STEP", "TYPE_INT32", 1),
                tensor("FINAL", "TYPE_BOOL", 1),
            ],
            "instance_group": [group(runs_on_gpu(opening["backend"], opening["device"]), instances)],
            "parameters": string_map(parameters(opening)),
        }
    )


def group(gpu: bool, count: int) -> dict[str, Any]:
    """Instances of a model: so many on each GPU, or in all on the CPU."""
    return {"kind": Symbol("KIND_GPU" if gpu else "KIND_CPU"), "count": count}


def tensor(name: str, kind: str, *dims: int) -> dict[str, Any]:
    """An input or an output of the server's type ``kind``; -1 is any size."""
    return {"name": name, "data_type": Symbol(kind), "dims": list(dims)}
