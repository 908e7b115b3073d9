"""One exported stage on ONNX Runtime. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from d3tom_export.errors import D3tomError


class Stage:
    """One ONNX Runtime session. Values go in and come out as ``OrtValue``, so they stay on the device between stages.

    Args:
        path: The stage's graph.
        options: Shared by the stages of a backend.
        providers: Execution providers in order of preference, as ONNX Runtime takes them.
        device: "cpu" or "cuda", where outputs are allocated.
    """

    def __init__(self, path: Path, options: ort.SessionOptions, providers: list[object], device: str) -> None:
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime raises a family of unrelated types
            raise D3tomError(
                f"ONNX Runtime {ort.__version__} cannot load stage {path.stem} of {path.parent}: {error}. "
                "Rebuild the bundle, or try a newer onnxruntime."
            ) from None
        self._device = device
        # Gives back what one long run took: prefill needs much more memory than any step after it.
        self._shrinking = ort.RunOptions()
        arena = "cpu:0" if device == "cpu" else "cpu:0;gpu:0"
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)

    def empty(self, shape: Sequence[int]) -> ort.OrtValue:
        """A float32 value of ``shape`` on the device, outside the sessions' arenas: freed when it is dropped."""
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
