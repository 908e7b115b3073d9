"""A backend by name, imported only when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import Loop
from d3tom_export.engines.toolkit import TOOLKITS
from d3tom_export.loop.backend import Backend
from d3tom_export.progress import Progress, no_progress

if TYPE_CHECKING:
    from d3tom_export.backends.onnxruntime_options import Device
    from d3tom_export.backends.rtx_runtime import Specialization

Graphs = Literal["standard", "tuned"]
"""Of a stage's two graphs for ONNX Runtime on the CPU: the one every other backend gets, and the one tuned for it."""


def has_both_graphs(name: str, device: Device, precision: str | None) -> bool:
    """Whether such a backend may run either kind of :data:`Graphs`: ONNX Runtime on the CPU, in the bundle's own."""
    if name not in ("auto", "onnxruntime") or device not in ("auto", "cpu") or precision not in (None, "fp32"):
        return False
    from d3tom_export.backends.onnxruntime_providers import choose_provider

    return choose_provider(device)[0] == "cpu"


def open_backend(
    name: str,
    bundle: Bundle,
    loop: Loop,
    *,
    device: Device = "auto",
    precision: str | None = None,
    cuda_graphs: bool = True,
    specialization: Specialization = "lazy",
    graphs: Graphs = "tuned",
    provider_cache: Path | None = None,
    progress: Progress = no_progress,
) -> Backend:
    """Open ``bundle``'s stages of ``loop`` on the backend called ``name``.

    "auto" takes ONNX Runtime, which needs no torch and no GPU. ``device`` and ``provider_cache`` are ONNX Runtime's,
    ``precision`` the engines' or its own, ``cuda_graphs`` for the TensorRT backends, ``specialization`` for
    TensorRT-RTX, ``graphs`` for ONNX Runtime on the CPU.
    """
    if name in TOOLKITS:
        from d3tom_export.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(
            bundle,
            loop,
            name,
            precision=precision,
            cuda_graphs=cuda_graphs,
            specialization=specialization,
            progress=progress,
        )
    if name == "pytorch":
        from d3tom_export.backends.pytorch import PyTorchBackend
        from d3tom_export.checkpoint.folder import open_checkpoint
        from d3tom_export.checkpoint.models import load_model

        progress("loading the eager model", 0, 1)
        checkpoint = open_checkpoint(bundle.folder, vocab_rows=bundle.manifest.vocab_rows)
        backend = PyTorchBackend(load_model(checkpoint), bundle.manifest.merge, kv_cache=loop == "cached")
        progress("eager model loaded", 1, 1)
        return backend
    from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(
        bundle,
        loop,
        device=device,
        precision=precision,
        tuned=graphs == "tuned",
        provider_cache=provider_cache,
        progress=progress,
    )
