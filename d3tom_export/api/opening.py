"""A bundle's folder to a model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from d3tom_export.api.model import Model
from d3tom_export.backends.choice import ENGINE_BACKENDS, check_choice
from d3tom_export.bundle.folder import Verify, load_bundle
from d3tom_export.errors import CallError, listing
from d3tom_export.loop.backend import Backend
from d3tom_export.pictures.seen import MOST_BYTES
from d3tom_export.pipeline import Reader
from d3tom_export.progress import Note, Progress, no_note, no_progress
from d3tom_export.trust.fields import shown

if TYPE_CHECKING:
    from d3tom_export.backends.onnxruntime_options import Device
    from d3tom_export.backends.rtx_runtime import Specialization


def open(
    bundle: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: Device = "auto",
    kv_cache: bool | None = None,
    precision: str | None = None,
    verify: Verify = "auto",
    provider_cache: str | os.PathLike[str] | None = None,
    cuda_graphs: bool | None = None,
    specialization: Specialization | None = None,
    ignore_orientation: bool = False,
    picture_bytes: int = MOST_BYTES,
    load: bool = True,
    progress: Progress = no_progress,
    note: Note = no_note,
) -> Model:
    """Open a bundle on a runtime: its files are verified, its stages loaded. Neither torch nor onnx is imported.

    Args:
        bundle: The folder that ``build`` wrote.
        backend: "auto" (ONNX Runtime), "onnxruntime", "tensorrt", "tensorrt-rtx", or "pytorch", the oracle, which does
            import torch.
        device: Where ONNX Runtime runs: "auto" (CUDA where it works, else the CPU), "cpu", "cuda", "tensorrt",
            "nv-tensorrt-rtx".
        kv_cache: Which loop to run of a bundle built for both. None: the one it has; of two, without a cache.
        precision: "fp32", "fp16", "bf16" or "int8", where the bundle has such graphs or engines. None: its own.
        verify: "auto" hashes files that changed since this machine hashed them, "full" every one.
        provider_cache: Where providers that build engines keep them, a folder of yours alone: it is run as it is found.
        cuda_graphs: Whether TensorRT replays recurring steps as CUDA graphs. None: it does.
        specialization: How TensorRT-RTX treats new shapes: "lazy", "eager", "none". None: "lazy".
        ignore_orientation: Show pictures as they are stored, whatever their EXIF orientation.
        picture_bytes: Of visual tokens (V, D) float32 to remember, so that a further question about a picture does not
            encode it again.
        load: Whether the stages are loaded now; else with the first answer, or by ``Model.load``.
        progress: Called as (what, parts done, parts in all) while stages load.
        note: Called with sentences that a user should read: that weights are random, that a picture was scaled down.

    Raises :class:`~d3tom_export.errors.D3tomError` where there is no bundle, where it is damaged or not what it
    says, and where backend, device or precision do not work here; ``ImportError`` where a runtime is not installed.
    """
    cache = None if provider_cache is None else _path(provider_cache, "provider_cache")
    check_choice(backend, device, precision, cuda_graphs, cache, specialization)
    if verify not in get_args(Verify):
        raise CallError(f"--verify {shown(verify)} is none of {listing(get_args(Verify))}.")
    opened = load_bundle(_path(bundle, "the bundle"), verify, reads_weights=backend not in ENGINE_BACKENDS)
    if opened.manifest.weights_note:
        note(opened.manifest.weights_note)
    loop = opened.choose_loop(kv_cache)
    reader = replace(Reader.of_bundle(opened), ignore_orientation=ignore_orientation)

    def runtime() -> Backend:
        from d3tom_export.backends.select import open_backend

        return open_backend(
            backend,
            opened,
            loop,
            device=device,
            precision=precision,
            cuda_graphs=cuda_graphs is not False,
            specialization=specialization or "lazy",
            provider_cache=cache,
            progress=progress,
        )

    one_thread = backend in ENGINE_BACKENDS
    model = Model(opened, loop, reader, runtime, picture_bytes=picture_bytes, one_thread=one_thread, note=note)
    if load:
        model.load()
    return model


def _path(value: Any, name: str) -> Path:
    try:
        return Path(value)
    except TypeError:
        raise CallError(f"{shown(value)} was given for {name}, expected the path of a folder.") from None
