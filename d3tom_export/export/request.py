"""What a build is asked for: what to read, which stages and engines to write, where to, and how to check.

Nothing is read but a name's meaning, and neither torch nor onnx is imported: what can be refused is refused as soon as
it is said.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from d3tom_export.bundle.half import HALF_PRECISIONS, HalfPrecision
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.geometry import raw_geometry
from d3tom_export.config import LOOPS, GenerationConfig, Loop, MergeConfig, ModelConfig
from d3tom_export.cpu.place import CpuPrecision
from d3tom_export.errors import D3tomError, listing
from d3tom_export.quantize.plan import QuantizeRequest

if TYPE_CHECKING:
    from d3tom_export.engines.build import EngineOptions
    from d3tom_export.engines.precision import Accumulation
    from d3tom_export.engines.record import MergeOp, Target
    from d3tom_export.engines.shapes import Range

WeightsMode = Literal["link", "copy", "float16"]
"""How a checkpoint's weight files come into a bundle: as hard links, which take no bytes, as copies, or converted to
float16, for GPUs without bfloat16."""

RandomWeights = Literal["random", "sparse"]
"""Weights of a geometry: bfloat16 noise of the usual variance, or zeros in a sparse file that takes no disk."""

GraphPrecision = Literal["int8", "fp16", "bf16"]
"""What ONNX Runtime may have graphs in beside those in float32; int8 is for the CPU."""


QUANTIZED_TWICE = (
    "--precision int8 quantizes floating-point weights when it loads them, and --quantize leaves none to its products. "
    "Take one of them."
)


NO_HALF_FLOAT4 = (
    "ONNX Runtime has no kernels for weights in nvfp4, and --precision fp16 and bf16 write graphs for it: on the CPU "
    "it runs such a bundle in float32. Leave --precision out, or give it with --engine, whose engines take nvfp4."
)


@dataclass(frozen=True)
class ModelSource:
    """The model that is built: a checkpoint's, or one of a geometry's size with weights that mean nothing.

    Raises :class:`D3tomError` for a geometry that is unknown or has a folder too, and for weights that do not go with
    where they come from.
    """

    folder: Path | None = None
    """The checkpoint's; None: the bundled model's, where there is no ``geometry``."""
    geometry: str | None = None
    """One of :data:`~d3tom_export.checkpoint.geometry.GEOMETRIES`."""
    weights: WeightsMode | RandomWeights | None = None
    """None: linked from a checkpoint, copied from the bundled model, random for a geometry."""
    clip_vocabulary: bool = True
    """Whether the embedding table is cut to the tokenizer's length, as the release does. Of checkpoints only."""
    vision_tower: Path | None = None
    """A folder with the vision tower of a checkpoint that was saved without its own."""

    def __post_init__(self) -> None:
        if self.vision_tower is not None and self.folder is None:
            raise D3tomError("--vision-tower completes a checkpoint: give that with --model.")
        if self.geometry is not None:
            if self.folder is not None:
                raise D3tomError("--geometry makes a model with random weights and does not go with --model.")
            raw_geometry(self.geometry)
        allowed = get_args(RandomWeights) if self.geometry is not None else get_args(WeightsMode)
        if self.weights is not None and self.weights not in allowed:
            raise D3tomError(
                f"--weights {self.weights} does not go with {'--geometry' if self.geometry else 'a checkpoint'}, which "
                f"takes one of {', '.join(allowed)}."
            )

    @property
    def checkpoint_folder(self) -> Path | None:
        """Where the checkpoint lies; None for a geometry."""
        if self.geometry is not None:
            return None
        return bundled_model() if self.folder is None else self.folder

    @property
    def name(self) -> str:
        """The geometry's, or the folder's."""
        return self.geometry or (self.folder or bundled_model()).resolve().name

    @property
    def weights_mode(self) -> WeightsMode | RandomWeights:
        """``weights``, or its default: the bundled model's files are small and belong to the package manager."""
        if self.weights is not None:
            return self.weights
        return "random" if self.geometry is not None else "copy" if self.folder is None else "link"


@dataclass(frozen=True)
class StageRequest:
    """The stages that are written, and the graphs of each. Raises :class:`D3tomError` for what cannot be."""

    merge: MergeConfig
    loops: tuple[Loop, ...] = ("uncached",)
    precisions: tuple[GraphPrecision, ...] = ()
    """Of ONNX Runtime's graphs beside the float32 ones, which are always written."""
    drop_token_after_image: bool = True
    """Whether prompts lose the token after a picture, as the release does when it answers."""
    share_prefix: bool = False
    """Whether questions about one picture may share its prefill, in the loop with a KV cache: one stage more."""
    quantize: QuantizeRequest | None = None
    """Weights in few bits; None: as the checkpoint has them."""

    def __post_init__(self) -> None:
        for what, given, known in (
            ("loops", self.loops, LOOPS),
            ("precisions", self.precisions, get_args(GraphPrecision)),
        ):
            if len(set(given)) != len(given) or not set(given) <= set(known):
                raise D3tomError(f"{what} are {listing(given)}. Give each of {listing(known)} once at most.")
        if self.quantize is not None and "int8" in self.precisions:
            raise D3tomError(QUANTIZED_TWICE)
        if self.quantize is not None and self.quantize.format == "nvfp4" and self.half_precisions:
            raise D3tomError(NO_HALF_FLOAT4)
        if not self.loops:
            raise D3tomError(f"A bundle without loops runs nothing. Ask for {' or '.join(LOOPS)}.")
        if "cached" in self.loops:
            self.merge.check_cached()
        elif self.merge.merge_at == "prefill":
            raise D3tomError(
                "A prompt is merged at its prefill in the loop with a KV cache alone. Build that with --kv-cache or "
                "--kv-cache both, or leave --merge-at at step."
            )
        elif self.share_prefix:
            raise D3tomError(
                "Questions share a picture's prefill in the loop with a KV cache alone. Build that with --kv-cache or "
                "--kv-cache both, or leave --share-prefix out."
            )

    @property
    def cpu_precisions(self) -> tuple[CpuPrecision, ...]:
        """Of the graphs that are tuned for the CPU."""
        return ("fp32", "int8") if "int8" in self.precisions else ("fp32",)

    @property
    def half_precisions(self) -> tuple[HalfPrecision, ...]:
        """Of further graphs for ONNX Runtime."""
        return tuple(precision for precision in HALF_PRECISIONS if precision in self.precisions)


@dataclass(frozen=True)
class EngineRequest:
    """The engines that are built from the stages."""

    targets: tuple[Target, ...]
    merge_op: MergeOp = "plugin"
    accumulate: Accumulation = "fp32"
    ranges: Mapping[str, Range | None] = field(default_factory=dict)
    """Sizes to serve, as :func:`~d3tom_export.engines.shapes.default_shapes` names them; None: its own."""
    optimization_level: int | None = None
    workspace_mib: int | None = None
    """Of both None leaves it to TensorRT."""

    @property
    def item_sizes(self) -> list[int]:
        """Bytes of a weight in the engines of each target."""
        return [4 if target.precision == "fp32" else 2 for target in self.targets]

    def check_weights(self, stored: Collection[str], quantize: QuantizeRequest | None = None) -> None:
        """Refuse weights in dtypes (as safetensors spells them), or in few bits, that a target has no use for."""
        from d3tom_export.engines.build import NO_ZERO_POINTS, check_weights

        if quantize is not None and quantize.asymmetric:
            raise D3tomError(NO_ZERO_POINTS)
        for target in self.targets:
            check_weights(target, stored, () if quantize is None else (quantize.format,))

    def options(self, model: ModelConfig, generation: GenerationConfig) -> EngineOptions:
        """The engines' sizes and settings for ``model``; refuses sizes beyond it."""
        from d3tom_export.engines.build import EngineOptions
        from d3tom_export.engines.builder import BuilderSettings
        from d3tom_export.engines.shapes import default_shapes

        settings = BuilderSettings(self.optimization_level, self.workspace_mib)
        shapes = default_shapes(model, generation, **self.ranges)
        return EngineOptions(shapes, self.merge_op, self.accumulate, settings)


@dataclass(frozen=True)
class BuildRequest:
    """Everything that a build is asked for. Raises :class:`D3tomError` for what cannot be."""

    source: ModelSource
    stages: StageRequest
    output: Path | None = None
    """The bundle's folder; None: one in the current folder, named for the model and its merging."""
    force: bool = False
    """Whether a bundle that is there is replaced."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """How answers depart from the model's own way, by the fields of :class:`~d3tom_export.config.GenerationConfig`."""
    engines: EngineRequest | None = None
    self_check: int | None = None
    """Samples to validate against PyTorch; None: as many as usual where memory holds the model in float32."""
    max_memory: int | None = None
    """Bytes that export and self-check may take; None: what is free."""

    def __post_init__(self) -> None:
        unknown = self.generation.keys() - {each.name for each in fields(GenerationConfig)}
        if unknown:
            raise D3tomError(f"An answer has no setting {listing(sorted(unknown))}.")
        if self.self_check is not None and self.self_check < 0:
            raise D3tomError(f"A self-check of {self.self_check} samples cannot be. Give 0 for none.")
        if self.max_memory is not None and self.max_memory <= 0:
            raise D3tomError(f"No build fits into {self.max_memory} bytes of memory. Say what there is.")

    @property
    def output_folder(self) -> Path:
        """``output``, or its default."""
        if self.output is not None:
            return self.output
        merge, loops = self.stages.merge, self.stages.loops
        suffix = "-both" if len(loops) > 1 else "-cached" if "cached" in loops else ""
        suffix += "-prefill" if merge.merge_at == "prefill" else ""
        suffix += "-shared" if self.stages.share_prefix else ""
        suffix += f"-{self.stages.quantize.format}" if self.stages.quantize is not None else ""
        return Path(f"{self.source.name}-d3tom-l{merge.layer}-r{merge.ratio:g}{suffix}")
