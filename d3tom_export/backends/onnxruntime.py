"""A bundle's stages on ONNX Runtime: CPU, or CUDA where the installed build offers it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from d3tom_export.bundle import WEIGHTS_FILE, Bundle
from d3tom_export.denoise import Floats, Ints, StepRequest, StepResult
from d3tom_export.errors import D3tomError
from d3tom_export.progress import Progress, no_progress
from d3tom_export.stages.contract import EXTERNAL_POLICIES


class _Stage:
    """One session. Values go in and come out as ``OrtValue``, so they stay on the device between stages."""

    def __init__(self, bundle: Bundle, name: str, options: ort.SessionOptions, providers: list[object], device: str):
        try:
            self._session = ort.InferenceSession(str(bundle.stage_path(name)), options, providers=providers)
        except Exception as error:  # ONNX Runtime raises a family of unrelated types
            raise D3tomError(
                f"ONNX Runtime {ort.__version__} cannot load stage {name} of {bundle.folder}: {error}. "
                "Rebuild the bundle, or try a newer onnxruntime."
            ) from None
        self._device = device

    def run(self, inputs: Mapping[str, ort.OrtValue], outputs: Sequence[str]) -> list[ort.OrtValue]:
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()


class OnnxRuntimeSession:
    """One answer in progress; the prompt's embeddings and positions stay on the device."""

    def __init__(self, backend: OnnxRuntimeBackend, prompt_embeddings: Floats, visual_positions: Ints) -> None:
        self._backend = backend
        self._prompt = backend.on_device(prompt_embeddings)
        self._visual_tokens = len(visual_positions)
        # Without visual tokens one text token stands in: K = V = 1 merges nothing, and no graph sees an empty axis.
        positions = visual_positions if self._visual_tokens else np.zeros(1, dtype=np.int64)
        self._visual_positions = backend.on_device(positions)

    def step(self, request: StepRequest) -> StepResult:
        stages, on_device = self._backend.stages, self._backend.on_device
        batch, answer_tokens = request.answer_ids.shape
        (answer,) = stages["embed"].run({"token_ids": on_device(request.answer_ids)}, ["embeddings"])
        (hidden,) = stages["front"].run({"prompt_embeddings": self._prompt, "answer_embeddings": answer}, ["hidden"])
        merge_inputs = {
            "hidden": hidden,
            "deciders": on_device(request.deciders),
            "visual_positions": self._visual_positions,
            "keep": on_device(np.array([max(request.keep, 1)], dtype=np.int64)),
        }
        if self._backend.needs_selection_scores:
            scores = request.selection_scores
            if scores is None or not self._visual_tokens:
                scores = np.zeros((batch, max(self._visual_tokens, 1)), dtype=np.float32)
            merge_inputs["selection_scores"] = on_device(scores)
        merge_outputs = ["merged", "kept", *(["positions"] if self._backend.keeps_positions else [])]
        merged = dict(zip(merge_outputs, stages["merge"].run(merge_inputs, merge_outputs), strict=True))

        back_inputs = {"merged": merged["merged"], "answer_length": on_device(np.array([answer_tokens]))}
        if self._backend.keeps_positions:
            back_inputs["positions"] = merged["positions"]
        wanted = ["token", "doubt", *(["logits"] if request.logits else [])]
        token, doubt, *logits = (value.numpy() for value in stages["back"].run(back_inputs, wanted))
        return StepResult(
            token=token,
            # In float64 from the doubt: the graph's float32 confidence ties at 1.0 where the release's does not.
            confidence=1.0 / (1.0 + doubt.astype(np.float64)),
            kept=merged["kept"].numpy() if request.merge else None,
            logits=logits[0] if logits else None,
        )


class OnnxRuntimeBackend:
    """A bundle on ONNX Runtime.

    Args:
        bundle: A verified bundle.
        device: "cpu", "cuda", or "auto" for CUDA where onnxruntime offers it.
        progress: Called as each stage is loaded.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, *, device: str = "auto", progress: Progress = no_progress) -> None:
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
        self.needs_selection_scores = bundle.manifest.merge.select in EXTERNAL_POLICIES
        self.keeps_positions = bundle.manifest.merge.positions == "original"
        options = ort.SessionOptions()
        options.log_severity_level = 3  # the optional input `answer_length` is meant, and would be warned of
        # TF32 would leave ten bits of the scores' mantissa: parity is claimed for float32.
        cuda = ("CUDAExecutionProvider", {"use_tf32": "0"})
        providers: list[object] = [cuda, "CPUExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
        self.stages: dict[str, _Stage] = {}
        for done, name in enumerate(bundle.manifest.stages):
            progress(f"loading {name}", done, len(bundle.manifest.stages))
            self.stages[name] = _Stage(bundle, name, options, providers, device)
        progress("stages loaded", len(bundle.manifest.stages), len(bundle.manifest.stages))

    def on_device(self, array: NDArray) -> ort.OrtValue:
        """``array`` as a value on the backend's device."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def embed_tokens(self, token_ids: Ints) -> Floats:
        return self.stages["embed"].run({"token_ids": self.on_device(token_ids)}, ["embeddings"])[0].numpy()

    def encode_views(self, pixel_values: Floats) -> Floats:
        values = {"pixel_values": self.on_device(pixel_values)}
        return self.stages["vision"].run(values, ["visual_features"])[0].numpy()

    @property
    def image_newline(self) -> NDArray[np.float32]:
        from safetensors import safe_open

        with safe_open(self._bundle.folder / WEIGHTS_FILE, framework="np") as file:
            return file.get_tensor("model.image_newline")

    def start(self, prompt_embeddings: Floats, visual_positions: Ints) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(self, prompt_embeddings, visual_positions)
