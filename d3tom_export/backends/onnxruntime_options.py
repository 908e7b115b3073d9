"""The options of ONNX Runtime's execution providers for one stage, as data. Imports no runtime.

TensorRT's two providers build an engine a stage. Its profile is the stage's own (engines/shapes.py), for which the
providers want strings; without one they would build for the first shapes that they see, and again for others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from d3tom_export.config import GenerationConfig, MergeConfig, ModelConfig
from d3tom_export.engines.shapes import SHAPE_INPUTS, Profile, Range, axis_ranges, default_shapes

Provider = Literal["cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
Device = Literal["auto", "cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"]
DEVICES: tuple[Device, ...] = get_args(Device)
"""A provider, or "auto" for CUDA where it works, else the CPU."""

ORT_NAMES: Mapping[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
BUILDING: frozenset[Provider] = frozenset(("tensorrt", "nv-tensorrt-rtx"))
"""Providers that build engines of the graphs they are given."""
MEMORY: Mapping[Provider, str] = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda", "nv-tensorrt-rtx": "cpu"}
"""Where values lie between the stages. TensorRT-RTX's provider is a plugin for a package whose Python interface
allocates no GPU memory: ONNX Runtime copies its inputs and outputs."""

_MOST_IN_PROTOBUF = 2**31 - 2**20
"""Bytes of weights that a message of protobuf holds beside a graph."""

Options = dict[str, str]


def provider_axes(
    model: ModelConfig, merge: MergeConfig, generation: GenerationConfig, *, kv_cache: bool
) -> dict[str, Range]:
    """The sizes that engines of a provider serve, by axis.

    Any picture, prompts of up to 512 other tokens, answers of up to twice the bundle's length, two at once.
    """
    usual = generation.gen_length
    longest = max(usual, min(2 * usual, model.language.max_sequence_length // 4))
    shapes = default_shapes(model, generation, batch=Range(1, 1, 2), answer_tokens=Range(1, usual, longest))
    return axis_ranges(shapes, merge, generation, kv_cache=kv_cache)


def profile_strings(profile: Profile) -> dict[str, str]:
    """``profile`` as the providers spell it: ``min``, ``opt`` and ``max`` of every input, values for shape inputs."""

    def spelled(which: int) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, _sizes(name, profile, which)))}" for name in profile)

    return {"min": spelled(0), "opt": spelled(1), "max": spelled(2)}


def _sizes(name: str, profile: Profile, which: int) -> tuple[int, ...]:
    # ONNX Runtime up to 1.31 gives TensorRT a shape input's opt for its max and the reverse (onnxruntime#32415).
    return profile[name][2 if which == 1 and name in SHAPE_INPUTS else which]


def cache_folder(cache: Path, stage: str, graph: bytes, weights_sha256: str) -> Path:
    """Where in ``cache`` a stage's engines lie: by its graph and weights, of which the providers' names do not tell."""
    digest = hashlib.sha256(graph + weights_sha256.encode()).hexdigest()
    return cache / f"{stage}-{digest[:16]}"


def cuda_options() -> Options:
    """TF32 would leave ten bits of the scores' mantissa: parity is claimed for float32."""
    return {"use_tf32": "0"}


def tensorrt_options(profile: Profile, cache: Path | None) -> Options:
    """Of the TensorRT provider. No precision is named: with one TensorRT would choose by layer, scores among them."""
    options = {f"trt_profile_{which}_shapes": spelled for which, spelled in profile_strings(profile).items()}
    if cache is not None:
        options |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(cache)}
        options |= {"trt_timing_cache_enable": "True", "trt_timing_cache_path": str(cache)}
    return options


def nv_tensorrt_rtx_options(profile: Profile, cache: Path | None, weight_bytes: int = 0) -> Options:
    """Of the TensorRT-RTX provider, whose cache holds the kernels it compiles."""
    options = {f"nv_profile_{which}_shapes": spelled for which, spelled in profile_strings(profile).items()}
    if cache is not None:
        options["nv_runtime_cache_path"] = str(cache)
    if weight_bytes > _MOST_IN_PROTOBUF:
        options["nv_use_external_data_initializer"] = "1"
    return options


def providers_for(
    provider: Provider, profile: Profile | None = None, cache: Path | None = None, weight_bytes: int = 0
) -> list[tuple[str, Options]]:
    """The providers of a stage's session in order of preference, each with its options.

    ``profile`` is what a :data:`BUILDING` provider needs, ``cache`` its folder for this stage. What TensorRT leaves,
    CUDA runs; what CUDA leaves, the CPU, as ONNX Runtime does with the small work on shapes.
    """
    found: list[tuple[str, Options]] = []
    if provider in BUILDING:
        assert profile is not None
        if provider == "tensorrt":
            found.append((ORT_NAMES[provider], tensorrt_options(profile, cache)))
        else:
            found.append((ORT_NAMES[provider], nv_tensorrt_rtx_options(profile, cache, weight_bytes)))
    if provider in ("cuda", "tensorrt"):
        found.append((ORT_NAMES["cuda"], cuda_options()))
    return [*found, (ORT_NAMES["cpu"], {})]
