"""What an instance in the server does before it opens its bundle, and what it says of its own failures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from d3tom_export.api.settings import OPENING
from d3tom_export.errors import D3tomError, printable
from d3tom_export.process import claim, cores

_SWITCHES = {"true": True, "false": False}


def parameters(opening: Mapping[str, Any]) -> dict[str, str]:
    """Arguments of :func:`d3tom_export.open` as parameters of config.pbtxt; None is left out."""
    words = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in opening.items()}
    return {name: word for name, word in words.items() if opening[name] is not None}


def opening(config: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`parameters`, of a configuration as the server gives it, which has parameters of its own."""
    found = {name: entry["string_value"] for name, entry in config.get("parameters", {}).items() if name in OPENING}
    return {name: _SWITCHES.get(word, word) for name, word in found.items()}


def claim_share(args: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Take this process's share of the machine: one GPU, or of several instances' cores.

    Called before any runtime is imported: CUDA looks once for the GPUs that a process may see. One that has the cores
    alone takes the threads that a library takes, which do not wait busily: a server has other work for them.
    """
    if args["model_instance_kind"] == "GPU":
        device = args["model_instance_device_id"]
        visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(device)] if int(device) < len(visible) else device
        return
    instances = sum(group.get("count", 1) for group in config.get("instance_group", [{}]))
    if instances > 1:
        claim(max(1, cores() // instances))


def check_tensors(tensor: Any) -> None:
    """Refuse a NumPy that the server's Python backend does not understand: its outputs would all be empty.

    ``tensor`` is the backend's ``Tensor``. One that was made for NumPy 1 misreads the size of NumPy 2's elements, which
    nothing tells; an array that has been in a tensor's memory shows it.
    """
    given = np.arange(1, 4, dtype=np.int32)
    found = tensor.from_dlpack("TOKENS", tensor("TOKENS", given)).as_numpy()
    if not np.array_equal(found, given):
        raise D3tomError(
            f"The server's Python backend was made for another NumPy than {np.__version__}, whose arrays it misreads "
            f"({given.tolist()} became {found.tolist()}): install numpy>=1.26,<2 for it."
        )


def unexpected(error: Exception) -> str:
    """What a failure that is none of the request's says to whoever asked."""
    return printable(
        f"The request stopped on an unexpected {type(error).__name__}: {error}. Unless memory ran out, this is a "
        "defect of d3tom-export; please report it."
    )
