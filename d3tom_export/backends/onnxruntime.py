"""A bundle's stages on ONNX Runtime: CPU, or CUDA where the installed build offers it. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from d3tom_export.backends.onnxruntime_sessions import CachedSession, UncachedSession
from d3tom_export.backends.onnxruntime_stage import Stage, runs_int8, session_options
from d3tom_export.bundle import Bundle
from d3tom_export.config import Loop
from d3tom_export.cpu.place import CPU_PRECISIONS, UNTUNED
from d3tom_export.denoise import Floats, Ints, Session
from d3tom_export.errors import D3tomError
from d3tom_export.progress import Progress, no_progress
from d3tom_export.stages.contract import EXTERNAL_POLICIES


class OnnxRuntimeBackend:
    """A bundle on ONNX Runtime.

    Args:
        bundle: A verified bundle.
        loop: Which of the bundle's loops to load.
        device: "cpu", "cuda", or "auto" for CUDA where onnxruntime offers it.
        precision: "fp32" or, on the CPU where the bundle has such graphs, "int8".
        tuned: Whether to take a stage's graph for the CPU, on the CPU, where the bundle has one; else the standard one.
        progress: Called as each stage is loaded.
    """

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        loop: Loop = "uncached",
        *,
        device: str = "auto",
        precision: str | None = None,
        tuned: bool = True,
        progress: Progress = no_progress,
    ) -> None:
        offered = ort.get_available_providers()
        if device == "cuda" and "CUDAExecutionProvider" not in offered:
            raise D3tomError(
                f"This onnxruntime {ort.__version__} has no CUDA provider (it offers {', '.join(offered)}). "
                "Install onnxruntime-gpu in place of onnxruntime, or use --device cpu."
            )
        if device == "auto":
            device = "cuda" if "CUDAExecutionProvider" in offered else "cpu"
        self.device = device
        self._bundle = bundle
        self.precision = precision or bundle.manifest.precision
        keys = bundle.stage_keys(loop)
        tunable = tuned and device == "cpu"
        self._tuned = {name for name, key in keys.items() if tunable and bundle.has_tuned(key, self.precision)}
        self._check_precision(keys.keys())
        if not tuned:
            self.name = f"{self.name}, standard graphs"
        self.kv_cache = loop == "cached"
        self.language, self.merge_layer = bundle.config.language, bundle.manifest.merge.layer
        self.needs_selection_scores = bundle.manifest.merge.select in EXTERNAL_POLICIES
        self.keeps_positions = bundle.manifest.merge.positions == "original"
        options = session_options(device, bundle.weights_folder)
        # TF32 would leave ten bits of the scores' mantissa: parity is claimed for float32.
        cuda = ("CUDAExecutionProvider", {"use_tf32": "0"})
        providers: list[object] = [cuda, "CPUExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
        self.stages: dict[str, Stage] = {}
        for done, (name, key) in enumerate(keys.items()):
            progress(f"loading {name}", done, len(keys))
            self.stages[name] = self._open(name, key, options, providers)
        progress("stages loaded", len(keys), len(keys))

    def _check_precision(self, names: Collection[str]) -> None:
        """Refuse a precision that the bundle has no graphs in, or that this ONNX Runtime cannot run."""
        if self.precision == self._bundle.manifest.precision:
            return
        if self.precision not in CPU_PRECISIONS:
            raise D3tomError(
                f"ONNX Runtime runs {' and '.join(CPU_PRECISIONS)}, not {self.precision}: that is for engines."
            )
        if self.device != "cpu":
            raise D3tomError(f"Graphs in {self.precision} are for the CPU. Add --device cpu.")
        if not set(names) - UNTUNED <= self._tuned:
            raise D3tomError(
                f"{self._bundle.folder} has no graphs in {self.precision}, or not all of them. Add them with "
                f"`d3tom-export build --bundle {self._bundle.folder} --precision {self.precision}`."
            )
        if not runs_int8():
            raise D3tomError(
                f"onnxruntime {ort.__version__} has no kernels for {self.precision} graphs. Install version 1.24 or "
                "later, or leave --precision out."
            )

    def _open(self, name: str, key: str, options: ort.SessionOptions, providers: list[object]) -> Stage:
        graph = self._bundle.graph(key, self.precision if name in self._tuned else None)
        return Stage(f"{key} of {self._bundle.folder}", graph, options, providers, self.device)

    def on_device(self, array: NDArray) -> ort.OrtValue:
        """``array`` as a value on the backend's device."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def run_stage(
        self, name: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        values = {input_name: self.on_device(array) for input_name, array in inputs.items()}
        try:
            found = self.stages[name].run(values, outputs)
        except Exception as error:  # ONNX Runtime raises a family of unrelated types
            raise D3tomError(f"ONNX Runtime cannot run stage {name}: {error}. Rebuild the bundle.") from None
        return {output: value.numpy() for output, value in zip(outputs, found, strict=True)}

    def embed_tokens(self, token_ids: Ints) -> Floats:
        return self.stages["embed"].run({"token_ids": self.on_device(token_ids)}, ["embeddings"])[0].numpy()

    def encode_views(self, pixel_values: Floats) -> Floats:
        values = {"pixel_values": self.on_device(pixel_values)}
        return self.stages["vision"].run(values, ["visual_features"])[0].numpy()

    @property
    def image_newline(self) -> NDArray[np.float32]:
        return self._bundle.image_newline()

    def start(self, prompt_embeddings: Floats, visual_positions: Ints, *, merges: bool = True) -> Session:
        if self.kv_cache:
            return CachedSession(self, prompt_embeddings, visual_positions, merges)
        return UncachedSession(self, prompt_embeddings, visual_positions)
