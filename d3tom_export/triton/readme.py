"""The page in a model repository: how a server is started on it, and asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d3tom_export.bundle.folder import Bundle
from d3tom_export.errors import printable
from d3tom_export.triton.configs import ANSWER, runs_on_gpu
from d3tom_export.triton.stage_models import StageModel
from d3tom_export.version import __version__

IMAGE = "nvcr.io/nvidia/tritonserver:24.10-py3"
"""The container of the server that was tried, 2.51."""


def readme(bundle: Bundle, opening: Mapping[str, Any], instances: int, stages: Sequence[StageModel]) -> str:
    """The page for a repository of ``bundle``, opened so, with these stages as models."""
    gpu = runs_on_gpu(opening["backend"], opening["device"])
    count = f"{instances} instance{'' if instances == 1 else 's'}"
    text = _part("readme.md").format(
        model=printable(bundle.manifest.model_name, 120),
        version=__version__,
        answer=ANSWER,
        backend=opening["backend"] + ("" if opening["device"] == "auto" else f" on {opening['device']}"),
        instances=f"{count} on each GPU" if gpu else count,
        gpus="--gpus all " if gpu else "",
        image=IMAGE,
    )
    if not stages:
        return text
    names = ", ".join(f"`{stage.name}`" for stage in stages)
    plans = any(stage.file.endswith(".plan") for stage in stages)
    text += _part("readme_plans.md" if plans else "readme_graphs.md").format(names=names, answer=ANSWER)
    return text + (_part("readme_plugin.md") if any(stage.needs_plugin for stage in stages) else "")


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
