"""A backend by name, imported only when asked for."""

from __future__ import annotations

from d3tom_export.bundle import Bundle
from d3tom_export.config import Loop
from d3tom_export.engines.toolkit import TOOLKITS
from d3tom_export.pipeline import Backend
from d3tom_export.progress import Progress, no_progress


def open_backend(
    name: str,
    bundle: Bundle,
    loop: Loop,
    *,
    device: str = "auto",
    precision: str | None = None,
    cuda_graphs: bool = True,
    progress: Progress = no_progress,
) -> Backend:
    """Open ``bundle``'s stages of ``loop`` on the backend called ``name``.

    "auto" takes ONNX Runtime, which needs no torch and no GPU. ``device`` is ONNX Runtime's, ``precision`` the
    engines' or its own, ``cuda_graphs`` for the TensorRT backends.
    """
    if name in TOOLKITS:
        from d3tom_export.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(bundle, loop, name, precision=precision, cuda_graphs=cuda_graphs, progress=progress)
    if name == "pytorch":
        from d3tom_export.backends.pytorch import PyTorchBackend
        from d3tom_export.checkpoint import load_model, open_checkpoint

        progress("loading the eager model", 0, 1)
        checkpoint = open_checkpoint(bundle.folder, vocab_rows=bundle.manifest.vocab_rows)
        backend = PyTorchBackend(load_model(checkpoint), bundle.manifest.merge, kv_cache=loop == "cached")
        progress("eager model loaded", 1, 1)
        return backend
    from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, loop, device=device, precision=precision, progress=progress)
