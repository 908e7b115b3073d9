"""Who takes part in ``benchmarks.loops``: a name, what it is, and how it answers. One more is one more entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.library import merge_library
from benchmarks.release_loop import ReleaseLoop
from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import GenerationConfig, Loop, MergeConfig
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.model.lavida import Lavida
from d3tom_export.pipeline import run_loop


class Answerer(Protocol):
    """Answers a prompt step by step; everything that happens once per answer happens in the call or its first step."""

    def __call__(
        self, prompt: Prompt, generation: GenerationConfig, merge: MergeConfig, *, logits: bool = False
    ) -> Iterator[StepRecord]: ...


@dataclass(frozen=True)
class Contestant:
    """One way to run the loop."""

    name: str
    what: str
    """In a line: what runs, in what precision, and what of it was compiled."""
    open: Callable[[Bundle, Loop], Answerer]
    float32: bool = True
    """Whether its tokens are to be those of every other float32 contestant."""
    compiles: bool = False
    """Whether a first whole answer compiles: that one is timed apart."""
    holds_merges: bool = True
    """Whether it can keep a merged cache over steps (``--per-block``)."""


def on_backend(opened: Callable[[Bundle, Loop], Backend], bundle: Bundle, loop: Loop) -> Answerer:
    """Our loop on the backend that ``opened`` gives."""
    backend, mask_token_id = opened(bundle, loop), bundle.config.language.mask_token_id

    def answer(
        prompt: Prompt, generation: GenerationConfig, merge: MergeConfig, *, logits: bool = False
    ) -> Iterator[StepRecord]:
        return run_loop(backend, prompt, mask_token_id, generation, merge, logits=logits)

    return answer


@cache
def _eager(folder: Path, vocab_rows: int | None, name: str) -> Lavida:
    """A bundle's eager model, one for each ``name``: compiling changes a model."""
    return load_model(open_checkpoint(folder, vocab_rows=vocab_rows))


def _model(bundle: Bundle, name: str = "eager") -> Lavida:
    return _eager(bundle.folder, bundle.manifest.vocab_rows, name)


def _release(bundle: Bundle, loop: Loop) -> Answerer:
    return ReleaseLoop(_model(bundle), bundle.manifest.merge.layer, kv_cache=loop == "cached").answer


def _pytorch(bundle: Bundle, loop: Loop) -> Backend:
    return PyTorchBackend(_model(bundle), bundle.manifest.merge, kv_cache=loop == "cached")


def _compiled(bundle: Bundle, loop: Loop) -> Backend:
    model = _model(bundle, f"compiled {loop}")
    for block in model.transformer.blocks:
        if loop == "uncached":
            block.compile(dynamic=True)
            continue
        # The cached loop calls a block's parts, between which it joins the cache on.
        for part in ("project", "attend", "feed_forward"):
            setattr(block, part, torch.compile(getattr(block, part), dynamic=True))
    return PyTorchBackend(model, bundle.manifest.merge, kv_cache=loop == "cached")


def _onnxruntime(bundle: Bundle, loop: Loop, precision: str | None = None) -> Backend:
    return OnnxRuntimeBackend(bundle, loop, device="cpu", precision=precision, merge_library=False)


def _with_library(bundle: Bundle, loop: Loop, precision: str | None = None) -> Backend:
    return OnnxRuntimeBackend(bundle, loop, device="cpu", precision=precision, merge_library=merge_library())


CONTESTANTS = (
    Contestant("release", "eager PyTorch float32 in the release's loop", _release, holds_merges=False),
    Contestant("pytorch", "our eager PyTorch backend, float32", partial(on_backend, _pytorch)),
    Contestant(
        "compiled",
        "our PyTorch backend under torch.compile with dynamic shapes, float32: whole blocks without a cache (the block "
        "at l* stays eager), projection, attention and feed-forward of every block with one",
        partial(on_backend, _compiled),
        compiles=True,
    ),
    Contestant("onnxruntime", "our ONNX Runtime backend, float32", partial(on_backend, _onnxruntime)),
    Contestant(
        "onnxruntime int8",
        "the same with products in int8",
        partial(on_backend, partial(_onnxruntime, precision="int8")),
        float32=False,
    ),
    Contestant(
        "onnxruntime, merge library",
        "our ONNX Runtime backend, float32, merging by the compiled kernel",
        partial(on_backend, _with_library),
    ),
    Contestant(
        "onnxruntime int8, merge library",
        "the same with products in int8",
        partial(on_backend, partial(_with_library, precision="int8")),
        float32=False,
    ),
)


def of_bundle(name: str, bundle: Bundle) -> Contestant:
    """``bundle`` on ONNX Runtime as one more contestant: the same checkpoint, built otherwise."""
    precision = bundle.manifest.precision
    return Contestant(
        name,
        f"bundle {bundle.folder.name} on ONNX Runtime, {precision}",
        lambda _, loop: on_backend(_onnxruntime, bundle, loop),
        float32=precision == "fp32",
    )
