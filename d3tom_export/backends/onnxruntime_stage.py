"""One exported stage on ONNX Runtime. Imports no torch."""

from __future__ import annotations

import math
import mmap
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from d3tom_export.errors import D3tomError
from d3tom_export.process import claimed

# Private pages, all there at once: as cheap to fault in as the C library's. Windows knows no such flags.
_PRIVATE: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)}
    if hasattr(mmap, "MAP_PRIVATE")
    else {}
)

_AS_REQUESTED = 1
"""Arenas grow by what is asked for, not by powers of two."""


@cache
def _register_arena() -> None:
    """Offer one arena to the sessions that ask for it; where an application has offered one, that is it."""
    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    with suppress(ort.capi.onnxruntime_pybind11_state.Fail):
        ort.create_and_register_allocator(cpu, ort.OrtArenaCfg({"arena_extend_strategy": _AS_REQUESTED}))


@cache
def _share_threads() -> bool:
    """Give all sessions of this process one pool of threads, if it is ours and this ONNX Runtime can.

    From then on ONNX Runtime refuses sessions that want threads of their own, an application's among them.
    """
    if not claimed() or not hasattr(ort, "set_global_thread_pool_sizes"):
        return False
    ort.set_global_thread_pool_sizes(0, 1)
    return True


def version() -> tuple[int, ...]:
    """ONNX Runtime's version: major, minor."""
    return tuple(int(part) for part in ort.__version__.split(".")[:2])


def runs_int8() -> bool:
    """Whether this ONNX Runtime has kernels for the int8 graphs: the first was 1.24."""
    return version() >= (1, 24)


@cache
def _overflows_in_int8(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor may add up pairs of int8 products in 16 bits, which they overflow.

    x86 without VNNI does. ONNX Runtime has kernels that do not, on request: they are slower, where there is VNNI too.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:
        return True
    return not flags & {"avx512_vnni", "avx_vnni"}


def session_options(device: str, weights_folder: Path | None = None) -> ort.SessionOptions:
    """Options of every stage's session. Graphs opened from bytes find their external data in ``weights_folder``.

    Stages run one after another. Sessions with threads of their own keep a core busy waiting for a while after each
    run, which the next stage lacks: on two cores that doubles an answer's time. So they share a pool, or do not wait.
    Sessions with arenas of their own keep the working memory of every stage at once, rounded up: on the CPU they share
    one, which halves what an answer needs.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # the optional input `answer_length` is meant, and would be warned of
    if _share_threads():
        options.use_per_session_threads = False
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if device == "cpu":
        _register_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        if _overflows_in_int8():
            options.add_session_config_entry("session.x64quantprecision", "1")
    if weights_folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights_folder))
    return options


class Stage:
    """One ONNX Runtime session. Values go in and come out as ``OrtValue``, so they stay on the device between stages.

    Args:
        name: What the stage is called in messages.
        graph: The stage's graph, looked through (:meth:`~d3tom_export.bundle.Bundle.graph`). It is opened from these
            very bytes, its external data in the folder that ``options`` name.
        options: Shared by the stages of a backend.
        providers: Execution providers in order of preference, as ONNX Runtime takes them.
        device: "cpu" or "cuda", where outputs are allocated.
    """

    def __init__(
        self, name: str, graph: bytes, options: ort.SessionOptions, providers: list[object], device: str
    ) -> None:
        try:
            self._session = ort.InferenceSession(graph, options, providers=providers)
        except Exception as error:  # ONNX Runtime raises a family of unrelated types
            raise D3tomError(
                f"ONNX Runtime {ort.__version__} cannot load stage {name}: {error}. "
                "Rebuild the bundle, or try a newer onnxruntime."
            ) from None
        self._device = device
        # Gives back what one long run took: prefill needs much more memory than any step after it.
        self._shrinking = ort.RunOptions()
        arena = "cpu:0" if device == "cpu" else "gpu:0"
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)

    def empty(self, shape: Sequence[int]) -> ort.OrtValue:
        """A float32 value of ``shape`` on the device, outside the sessions' arenas: freed when it is dropped.

        On the CPU it is mapped by itself, so that freeing gives it back to the system: the C library would keep it.
        """
        if self._device == "cpu":
            size = math.prod(shape)
            length = max(size, 1) * np.dtype(np.float32).itemsize
            pages = mmap.mmap(-1, length, **_PRIVATE)
            return ort.OrtValue.ortvalue_from_numpy(np.frombuffer(pages, np.float32, size).reshape(shape))
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.float32, self._device, 0)

    def run(
        self,
        inputs: Mapping[str, ort.OrtValue],
        outputs: Sequence[str] = (),
        *,
        into: Mapping[str, ort.OrtValue] | None = None,
        shrink: bool = False,
    ) -> list[ort.OrtValue]:
        """The named ``outputs``, newly allocated; outputs named in ``into`` are written there.

        ``shrink`` gives the run's working memory back afterwards.
        """
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, self._device)
        for name, value in (into or {}).items():
            binding.bind_ortvalue_output(name, value)
        self._session.run_with_iobinding(binding, self._shrinking if shrink else None)
        return binding.get_outputs()[: len(outputs)]
