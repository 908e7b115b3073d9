"""One exported stage on ONNX Runtime. Imports no torch."""

from __future__ import annotations

import math
import mmap
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from d3tom_export.backends.onnxruntime_options import MEMORY, Options, Provider
from d3tom_export.backends.onnxruntime_package import ort, ort_version
from d3tom_export.backends.onnxruntime_providers import make_session, share_threads
from d3tom_export.engines.shapes import SHAPE_INPUTS, Profile, check_fits
from d3tom_export.errors import D3tomError

# Private pages, all there at once: as cheap to fault in as the C library's. Windows knows no such flags.
_PRIVATE: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)}
    if hasattr(mmap, "MAP_PRIVATE")
    else {}
)

_FALLEN_BACK = "`d3tom-export doctor` says which providers work here; --provider cpu always does."
_OUTSIDE = "Run it with --provider cuda or cpu, which take any size."

_AS_REQUESTED = 1
"""Arenas grow by what is asked for, not by powers of two."""


@cache
def _register_arena() -> None:
    """Offer one arena to the sessions that ask for it; where an application has offered one, that is it."""
    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    with suppress(ort.capi.onnxruntime_pybind11_state.Fail):
        ort.create_and_register_allocator(cpu, ort.OrtArenaCfg({"arena_extend_strategy": _AS_REQUESTED}))


def runs_int8() -> bool:
    """Whether this ONNX Runtime has kernels for the int8 graphs: the first was 1.24."""
    return ort_version() >= (1, 24)


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


def session_options(
    provider: str, weights_folder: Path | None = None, *, rounds_inputs: bool = False
) -> ort.SessionOptions:
    """Options of a stage's session. Graphs opened from bytes find their external data in ``weights_folder``.

    ``rounds_inputs`` tells that products of theirs have both sides in float8.

    Stages run one after another. Sessions with threads of their own keep a core busy waiting for a while after each
    run, which the next stage lacks: on two cores that doubles an answer's time. So they share a pool, or do not wait.
    Sessions with arenas of their own keep the working memory of every stage at once, rounded up: on the CPU they share
    one, which halves what an answer needs.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # the optional input `answer_length` is meant, and would be warned of
    if share_threads():
        options.use_per_session_threads = False
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if provider == "cpu":
        _register_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Products with quantized weights would round their other side to int8: its words for float32 are "level 1".
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if rounds_inputs:
            # 1.31 makes integer kernels of such products, which do not load: they are computed as the graph says.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if _overflows_in_int8():
            options.add_session_config_entry("session.x64quantprecision", "1")
    if weights_folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights_folder))
    return options


_ONNX_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
"""ONNX's numbers of the types that a stage's floating-point tensors have, by ONNX Runtime's names."""
_NUMPY_TYPES: dict[int, type[np.generic]] = {1: np.float32, 10: np.float16, 16: np.uint16}
"""The NumPy types of the same sizes; there is no bfloat16."""


class Stage:
    """One ONNX Runtime session. Values go in and come out as ``OrtValue``, so they stay on the device between stages.

    Args:
        name: What the stage is called in messages.
        graph: The stage's graph, looked through (:meth:`~d3tom_export.bundle.folder.Bundle.graph`). It is opened from
            these very bytes, its external data in the folder that ``options`` name.
        options: Of this session; those of several may be one.
        provider: What the session must have, or there is none.
        providers: Execution providers in order of preference, with their options.
        profile: The sizes that the provider builds an engine for; None: it builds none.

    Raises :class:`D3tomError` where ONNX Runtime cannot load the graph, or makes a session without ``provider``.
    """

    def __init__(
        self,
        name: str,
        graph: bytes,
        options: ort.SessionOptions,
        provider: Provider,
        providers: Sequence[tuple[str, Options]],
        profile: Profile | None = None,
    ) -> None:
        try:
            self._session = make_session(provider, graph, options, providers)
        except D3tomError as error:
            raise D3tomError(f"Stage {name} does not run on {provider}: {error} {_FALLEN_BACK}") from None
        except Exception as error:  # ONNX Runtime raises a family of unrelated types
            raise D3tomError(
                f"ONNX Runtime {ort.__version__} cannot load stage {name}: {error}. "
                "Rebuild the bundle, or try a newer onnxruntime."
            ) from None
        self._name, self._profile, self._device = name, profile, MEMORY[provider]
        self.seconds = 0.0
        """How long all of its runs took so far."""
        self.types = {each.name: each.type for each in (*self._session.get_inputs(), *self._session.get_outputs())}
        """ONNX Runtime's name of each tensor's type."""
        # Gives back what one long run took: prefill needs much more memory than any step after it.
        self._shrinking = ort.RunOptions()
        arena = "cpu:0" if self._device == "cpu" else "gpu:0"
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)

    def type_of(self, name: str) -> int:
        """ONNX's number of the type of a floating-point tensor."""
        return _ONNX_TYPES.get(self.types.get(name, ""), 1)

    def empty(self, name: str, shape: Sequence[int]) -> ort.OrtValue:
        """A value of ``shape`` and of the output ``name``'s type, outside the sessions' arenas: freed when dropped.

        On the CPU it is mapped by itself, so that freeing gives it back to the system: the C library would keep it.
        """
        kind = self.type_of(name)
        dtype = np.dtype(_NUMPY_TYPES[kind])
        if self._device == "cpu":
            size = math.prod(shape)
            pages = mmap.mmap(-1, max(size, 1) * dtype.itemsize, **_PRIVATE)
            array = np.frombuffer(pages, dtype, size).reshape(shape)
            if kind == _ONNX_TYPES["tensor(bfloat16)"]:
                return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)
            return ort.OrtValue.ortvalue_from_numpy(array)
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), kind, self._device, 0)

    def run(
        self,
        inputs: Mapping[str, ort.OrtValue],
        outputs: Sequence[str] = (),
        *,
        into: Mapping[str, ort.OrtValue] | None = None,
        shrink: bool = False,
    ) -> list[ort.OrtValue]:
        """The named ``outputs``, newly allocated; outputs named in ``into`` are written there.

        ``shrink`` gives the run's working memory back afterwards. Raises :class:`D3tomError` for sizes that the stage's
        engine was not built for.
        """
        if self._profile is not None:
            check_fits(self._name, self._profile, {name: _sizes(name, inputs[name]) for name in inputs}, _OUTSIDE)
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, self._device)
        for name, value in (into or {}).items():
            binding.bind_ortvalue_output(name, value)
        started = time.perf_counter()
        self._session.run_with_iobinding(binding, self._shrinking if shrink else None)
        self.seconds += time.perf_counter() - started
        return binding.get_outputs()[: len(outputs)]


def _sizes(name: str, value: ort.OrtValue) -> tuple[int, ...]:
    """What a profile knows of an input: its shape, or the value of one that is an axis."""
    return tuple(map(int, value.numpy())) if name in SHAPE_INPUTS else tuple(value.shape())
