"""How TensorRT-RTX runs engines: what it captures, how it compiles for shapes, and the kernels that it compiled.

Its plans hold general kernels and what is needed to compile special ones on the machine they run on. What a process has
compiled is kept in the user's cache folder for the next one; bundles stay as they are, since their manifest lists every
file. Which of it still fits, TensorRT-RTX decides itself: it compares its version, the GPU and the driver.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from typing import Any, Literal

from d3tom_export.engines.record import EngineRecord, Target
from d3tom_export.engines.toolkit import Toolkit
from d3tom_export.progress import Note, no_note
from d3tom_export.trust.user_cache import UserCache

Specialization = Literal["lazy", "eager", "none"]
"""For a shape that an engine has not run yet: compile kernels beside and answer with general ones meanwhile, compile
first, or stay with the general ones."""

KERNELS = UserCache("tensorrt-rtx", most=32, limit=1 << 30)
"""One file for the engines of a loop on one kind of GPU."""

_BETWEEN_SAVES = 60.0
"""Seconds: answers may come faster than a cache can be written."""


def kernels_file(toolkit: Toolkit, target: Target, gpu: str, records: Iterable[EngineRecord]) -> str:
    """The name that the kernels of these engines are kept under, on GPUs called ``gpu``."""
    content = "\n".join([gpu, *sorted(record.plan_sha256 for record in records)])
    place = target.folder.rpartition("/")[2]
    return f"{place}-{toolkit.version}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.cache"


class RtxRuntime:
    """What the contexts of a backend's engines have in common. It must live as long as the last of them.

    Args:
        toolkit: TensorRT-RTX.
        file: Where in :data:`KERNELS` compiled kernels are kept (:func:`kernels_file`).
        own_graphs: Let it capture CUDA graphs by itself.
        specialization: How it compiles for new shapes.
        note: Called with what the user should know.
    """

    def __init__(
        self, toolkit: Toolkit, file: str, *, own_graphs: bool, specialization: Specialization, note: Note = no_note
    ) -> None:
        self._trt, self._file, self._note = toolkit.trt, file, note
        self._own_graphs, self._specialization = own_graphs, specialization
        self._cache: Any = None
        self._saved_bytes, self._saved_at = 0, float("-inf")

    def config(self, engine: Any) -> Any:
        """The configuration for a context of ``engine``; CUDA's device must be set."""
        trt = self._trt
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        graphs, strategies = trt.CudaGraphStrategy, trt.DynamicShapesKernelSpecializationStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if self._own_graphs else graphs.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, self._specialization.upper())
        if self._cache is None:
            self._cache = self._load(config)
        config.set_runtime_cache(self._cache)  # without it, it compiles as ever
        return config

    def _load(self, config: Any) -> Any:
        cache, kept = config.create_runtime_cache(), KERNELS.read(self._file)
        if kept is None:
            return cache
        if cache.deserialize(kept):
            self._saved_bytes = len(kept)
        else:
            KERNELS.remove(self._file)
            self._note(f"kernels kept in {KERNELS.path(self._file)} do not fit here: they are compiled anew")
        return cache

    def save(self, *, at_once: bool = True) -> None:
        """Keep what was compiled, if that is more than is kept; not ``at_once`` means: unless that was done lately."""
        now = time.monotonic()
        if self._cache is None or (not at_once and now - self._saved_at < _BETWEEN_SAVES):
            return
        content = self._cache.serialize()
        self._saved_at = now
        if content is None or content.nbytes <= self._saved_bytes:
            return
        if KERNELS.write(self._file, memoryview(content)):
            self._saved_bytes = content.nbytes

    def close(self) -> None:
        """Let go of the cache; no context that uses it may be left."""
        self._cache = None
