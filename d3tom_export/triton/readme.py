"""The page in a model repository: how a server is started on it, and asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d3tom_export.bundle.folder import Bundle
from d3tom_export.errors import printable
from d3tom_export.triton.configs import ANSWER, runs_on_gpu
from d3tom_export.triton.runtime import takes_plugin
from d3tom_export.triton.stage_models import StageModel
from d3tom_export.version import __version__

IMAGE = "nvcr.io/nvidia/tritonserver:24.10-py3"
"""The container of the server that was tried, 2.51. It has Python 3.10."""
IMAGE_FOR_PLUGINS = "nvcr.io/nvidia/tritonserver:24.12-py3"
"""One with Python 3.12, as its release notes say, for what has no wheel for 3.10 any more."""


def readme(
    bundle: Bundle,
    opening: Mapping[str, Any],
    instances: int,
    stages: Sequence[StageModel],
    built: str | None = None,
) -> str:
    """The page for a repository of ``bundle``, opened so, with these stages as models.

    ``built`` is the version of TensorRT that built its engines.
    """
    gpu = runs_on_gpu(opening["backend"], opening["device"])
    newer = takes_plugin(opening["device"])
    count = f"{instances} instance{'' if instances == 1 else 's'}"
    text = _part("readme.md").format(
        model=printable(bundle.manifest.model_name, 120),
        version=__version__,
        answer=ANSWER,
        backend=opening["backend"] + ("" if opening["device"] == "auto" else f" on {opening['device']}"),
        instances=f"{count} on each GPU" if gpu else count,
        gpus="--gpus all " if gpu else "",
        python=" It must be 3.11 or later: ONNX Runtime 1.24 has no wheel for 3.10." if newer else "",
        image=IMAGE_FOR_PLUGINS if newer else IMAGE,
    )
    if not stages:
        return text
    names = ", ".join(f"`{stage.name}`" for stage in stages)
    plans = any(stage.file.endswith(".plan") for stage in stages)
    part = _part("readme_plans.md" if plans else "readme_graphs.md")
    text += part.format(names=names, answer=ANSWER, built=built)
    return text + (_part("readme_plugin.md") if any(stage.needs_plugin for stage in stages) else "")


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
