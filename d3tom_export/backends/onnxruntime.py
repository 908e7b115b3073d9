"""A bundle's stages on ONNX Runtime: the CPU, or one of its providers for NVIDIA's GPUs. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3tom_export.backends.onnxruntime_loaded import LoadedStages
from d3tom_export.backends.onnxruntime_options import (
    BUILDING,
    MEMORY,
    Device,
    cache_folder,
    provider_axes,
    providers_for,
)
from d3tom_export.backends.onnxruntime_package import ort, overlapping_packages
from d3tom_export.backends.onnxruntime_prefixes import MOST_BYTES, PrefixStore
from d3tom_export.backends.onnxruntime_providers import choose_provider, keep_float32
from d3tom_export.backends.onnxruntime_sessions import CachedSession, UncachedSession
from d3tom_export.backends.onnxruntime_stage import Stage, runs_int8, session_options
from d3tom_export.bundle.folder import Bundle, listed_files
from d3tom_export.bundle.half import HALF_PRECISIONS
from d3tom_export.bundle.manifest import weights_sha256
from d3tom_export.checkpoint.tensors import weight_bytes
from d3tom_export.config import Loop
from d3tom_export.cpu.place import CPU_PRECISIONS, UNTUNED, with_library
from d3tom_export.engines.shapes import SHAPE_INPUTS, stage_profile
from d3tom_export.errors import D3tomError, SizeError, UnexpectedError
from d3tom_export.loop.denoise import Floats, Ints, PromptMerge, Session
from d3tom_export.plugins.cpu_library import give_kernel, named_library
from d3tom_export.progress import Progress, no_progress
from d3tom_export.trust.graphs import without_defaults


class OnnxRuntimeBackend:
    """A bundle on ONNX Runtime.

    Args:
        bundle: A verified bundle.
        loop: Which of the bundle's loops to load.
        device: "cpu", "cuda", or another provider for GPUs, "tensorrt" or "nv-tensorrt-rtx", which build engines of
            the stages as they are loaded; "auto" for CUDA where it works, else the CPU.
        precision: "fp32", or where the bundle has such graphs "fp16", "bf16" or, on the CPU, "int8".
        tuned: Whether to take a stage's graph for the CPU, on the CPU, where the bundle has one; else the standard one.
        merge_library: What merges caches there: a library (:mod:`d3tom_export.plugins.cpu_library`), True for the one
            that the environment names, if it names one, False for ONNX Runtime's own operators.
        provider_cache: Folder in which a provider keeps what it builds; None: it builds anew each time.
        prefix_bytes: Of keys and values of prompts' prefixes to keep for further questions, where they are shared.
        progress: Called as each stage is loaded, and where "auto" leaves a GPU's ONNX Runtime for the CPU.

    Raises :class:`D3tomError` where the provider or the precision asked for does not work here, with what to do.
    """

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        loop: Loop = "uncached",
        *,
        device: Device = "auto",
        precision: str | None = None,
        tuned: bool = True,
        merge_library: bool | Path = True,
        provider_cache: Path | None = None,
        prefix_bytes: int = MOST_BYTES,
        progress: Progress = no_progress,
    ) -> None:
        self.precision = precision or bundle.manifest.precision
        if device in BUILDING and self.precision == "fp32":
            keep_float32()
        self.provider, notice = choose_provider(device)
        overlap = overlapping_packages()
        for note in (notice, overlap.found if overlap else ""):
            if note:
                progress(note, 1, 1)
        self.device = MEMORY[self.provider]
        self._bundle, self._loop, self._cache = bundle, loop, provider_cache
        keys = bundle.stage_keys(loop)
        tunable = tuned and self.provider == "cpu"
        if not bundle.manifest.standard_on_cpu and not tunable and self.provider not in BUILDING:
            raise D3tomError(
                f"The standard graphs of {bundle.folder} hold weights in nvfp4, floats of four bits, for which ONNX "
                "Runtime has no kernels: it runs the graphs that the bundle has for the CPU, which have the same "
                "numbers as integers (--provider cpu, without --graphs). On GPUs engines run the standard ones: "
                f"`d3tom-export build --bundle {bundle.folder} --engine tensorrt-rtx --sm 120`."
            )
        self._tuned = {name for name, key in keys.items() if tunable and bundle.has_tuned(key, self.precision)}
        self._check_precision(keys)
        self._library: Path | None = None
        if any(bundle.has_tuned(keys[name], with_library(self.precision)) for name in self._tuned):
            self._library = named_library() if merge_library is True else merge_library or None
        if self.provider != "cpu":
            self.name = f"{self.name} ({self.provider})"
        elif not tuned:
            self.name = f"{self.name}, standard graphs"
        elif self._library is not None:
            self.name = f"{self.name}, merge library"
        self.kv_cache, self.language = loop == "cached", bundle.config.language
        self._axes = None
        if self.provider in BUILDING:
            manifest = bundle.manifest
            self._axes = provider_axes(bundle.config, manifest.merge, manifest.generation, kv_cache=self.kv_cache)
        self.stages: dict[str, Stage] = {}
        what = "building an engine of" if self.provider in BUILDING else "loading"
        for done, (name, key) in enumerate(keys.items()):
            progress(f"{what} {name}", done, len(keys))
            self.stages[name] = self._open(name, key)
        self._loaded = LoadedStages(self.stages, self.device, self.language, bundle.manifest.merge)
        # What is kept goes through NumPy, which has no bfloat16.
        self.shares_prefix = "extend" in self.stages and self.precision != "bf16"
        self.prefixes = PrefixStore(prefix_bytes)
        """Those that further questions need not run again."""
        progress("stages loaded", len(keys), len(keys))

    def _check_precision(self, keys: Mapping[str, str]) -> None:
        """Refuse a precision that the bundle has no graphs in, or that this ONNX Runtime cannot run."""
        bundle, precision = self._bundle, self.precision
        if precision == bundle.manifest.precision:
            return
        if precision not in (*CPU_PRECISIONS, *HALF_PRECISIONS):
            raise D3tomError(
                f"ONNX Runtime runs {', '.join((*CPU_PRECISIONS, *HALF_PRECISIONS))}, not {precision}: that is for "
                "engines."
            )
        if precision in HALF_PRECISIONS:
            there = all(bundle.has_half(key, precision) for key in keys.values())
        elif self.provider != "cpu":
            raise D3tomError(f"Graphs in {precision} are for the CPU. Add --provider cpu.")
        else:
            there = keys.keys() - UNTUNED <= self._tuned
        if not there:
            raise D3tomError(
                f"{bundle.folder} has no graphs in {precision}, or not all of them. Add them with "
                f"`d3tom-export build --bundle {bundle.folder} --precision {precision}`."
            )
        if precision == "int8" and not runs_int8():
            raise D3tomError(
                f"onnxruntime {ort.__version__} has no kernels for {precision} graphs. Install version 1.24 or "
                "later, or leave --precision out."
            )

    def _open(self, name: str, key: str) -> Stage:
        bundle = self._bundle
        chosen = self.precision in HALF_PRECISIONS and self.precision != bundle.manifest.precision
        by_library = self._library is not None and bundle.has_tuned(key, with_library(self.precision))
        precision = with_library(self.precision) if by_library else self.precision
        graph = bundle.graph(key, precision if chosen or name in self._tuned else None)
        options = session_options(self.provider, bundle.weights_folder, rounds_inputs=bundle.manifest.rounds_inputs)
        if by_library and self._library is not None:
            give_kernel(options, self._library)
        profile = cache = None
        if self._axes is not None:
            graph = without_defaults(graph)
            profile = stage_profile(bundle.manifest.stages[key], self._axes)
            if self._cache is not None:
                files = listed_files(bundle.folder) if bundle.files is None else bundle.files
                cache = cache_folder(self._cache, key, graph, weights_sha256(files))
                cache.mkdir(parents=True, exist_ok=True)
        weight_bytes = self._weight_bytes(key) if self.provider == "nv-tensorrt-rtx" else 0
        providers = providers_for(self.provider, profile, cache, weight_bytes)
        stage = f"{key} of {bundle.folder}"
        try:
            return Stage(stage, graph, options, self.provider, providers, profile)
        except D3tomError as error:
            if self.precision == "bf16" and self.provider == "cpu":
                raise D3tomError(
                    f"ONNX Runtime {ort.__version__} has not the kernels to run {key} in bf16 on the CPU. Take "
                    f"--precision fp16 or fp32 there, or a GPU with --provider cuda. (It says: {error})"
                ) from None
            raise

    def _weight_bytes(self, key: str) -> int:
        """Bytes of a stage's weights as they are stored."""
        stored = weight_bytes(self._bundle.folder, self._bundle.config)
        return sum(stored.get(name, 0) for name in self._bundle.manifest.stage_weights[key])

    def check(self, axes: Mapping[str, int]) -> None:
        """Refuse sizes that a provider's engines are not built for; others take any."""
        for axis, size in axes.items():
            served = (self._axes or {}).get(axis)
            if served is not None and not served.min <= size <= served.max:
                raise SizeError(
                    f"The engines of {self.provider} are built for {axis} of {served.min} to {served.max}, and this "
                    f"needs {size}. Run it with --provider cuda or cpu, which take any size."
                )

    def run_stage(
        self, name: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        stage, loaded = self.stages[name], self._loaded
        if self.precision == "bf16":
            raise D3tomError(
                f"Stage {name} in bf16 cannot be run alone: NumPy has no bfloat16 to give it or to take. Look at the "
                "stages in fp16, or at engines in bf16 (--backend tensorrt or tensorrt-rtx)."
            )
        given = self._defaults(name) | dict(inputs)
        values = {}
        for input_name, array in given.items():
            typed = array.astype(np.float16) if stage.types.get(input_name) == "tensor(float16)" else array
            values[input_name] = loaded.on_host(typed) if input_name in SHAPE_INPUTS else loaded.on_device(typed)
        try:
            found = stage.run(values, outputs)
        except D3tomError:
            raise
        except Exception as error:  # ONNX Runtime raises a family of unrelated types
            raise UnexpectedError(f"ONNX Runtime cannot run stage {name}: {error}. Rebuild the bundle.") from None
        arrays = {output: value.numpy() for output, value in zip(outputs, found, strict=True)}
        return {output: a.astype(np.float32) if a.dtype == np.float16 else a for output, a in arrays.items()}

    def _defaults(self, name: str) -> dict[str, NDArray[Any]]:
        """The inputs of stage ``name`` that have a default in the contract and none in the graph that is run."""
        if self._axes is None and self.precision == self._bundle.manifest.precision:
            return {}
        manifest = self._bundle.manifest
        inputs = manifest.stages[self._bundle.stage_keys(self._loop)[name]].inputs
        return {spec.name: np.array([spec.default]) for spec in inputs if spec.default is not None}

    def stage_seconds(self) -> dict[str, float]:
        return {name: stage.seconds for name, stage in self.stages.items()}

    def embed_tokens(self, token_ids: Ints) -> Floats:
        return self.stages["embed"].run({"token_ids": self._loaded.on_device(token_ids)}, ["embeddings"])[0].numpy()

    def encode_views(self, pixel_values: Floats) -> Floats:
        values = {"pixel_values": self._loaded.on_device(pixel_values)}
        return self.stages["vision"].run(values, ["visual_features"])[0].numpy()

    @property
    def image_newline(self) -> NDArray[np.float32]:
        return self._bundle.image_newline()

    def start(
        self,
        prompt_embeddings: Floats,
        visual_positions: Ints,
        *,
        merges: bool = True,
        prompt_merge: PromptMerge | None = None,
        shared_rows: int = 0,
    ) -> Session:
        if shared_rows and not self.shares_prefix:
            self._bundle.manifest.check_shares_prefix()
            raise D3tomError(
                "Questions cannot share a picture's prefill in bf16 graphs: it is kept by way of NumPy, which has no "
                "bfloat16. Take --precision fp16 or fp32, or leave --share-prefix out."
            )
        if self.kv_cache:
            prompt = (prompt_embeddings, visual_positions)
            return CachedSession(self._loaded, *prompt, merges, prompt_merge, shared_rows, self.prefixes)
        return UncachedSession(self._loaded, prompt_embeddings, visual_positions)
