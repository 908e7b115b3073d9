"""A bundle's stages on ONNX Runtime: CPU, or CUDA where the installed build offers it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from d3tom_export.backends.onnxruntime_sessions import CachedSession, UncachedSession
from d3tom_export.backends.onnxruntime_stage import Stage, session_options
from d3tom_export.bundle import Bundle
from d3tom_export.config import Loop
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
        progress: Called as each stage is loaded.
    """

    name = "onnxruntime"

    def __init__(
        self, bundle: Bundle, loop: Loop = "uncached", *, device: str = "auto", progress: Progress = no_progress
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
        self.precision = bundle.manifest.precision
        self.kv_cache = loop == "cached"
        self.language, self.merge_layer = bundle.config.language, bundle.manifest.merge.layer
        self.needs_selection_scores = bundle.manifest.merge.select in EXTERNAL_POLICIES
        self.keeps_positions = bundle.manifest.merge.positions == "original"
        options = session_options(device)
        # TF32 would leave ten bits of the scores' mantissa: parity is claimed for float32.
        cuda = ("CUDAExecutionProvider", {"use_tf32": "0"})
        providers: list[object] = [cuda, "CPUExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
        self.stages: dict[str, Stage] = {}
        paths = bundle.stages(loop)
        for done, (name, path) in enumerate(paths.items()):
            progress(f"loading {name}", done, len(paths))
            self.stages[name] = self._open(name, path, options, providers)
        progress("stages loaded", len(paths), len(paths))

    def _open(self, name: str, path: Path, options: ort.SessionOptions, providers: list[object]) -> Stage:
        return Stage(path, options, providers, self.device)

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
