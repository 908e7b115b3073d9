"""What a build is asked for: what to read, which stages and engines to write, where to, and how to check.

Nothing is read but a name's meaning, and neither torch nor onnx is imported: what can be refused is refused as soon as
it is said.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from d3tom_export.bundle.half import HALF_PRECISIONS, HalfPrecision
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.geometry import raw_geometry
from d3tom_export.config import LOOPS, CacheMergeConfig, GenerationConfig, Loop, MergeConfig, ModelConfig
from d3tom_export.cpu.place import CpuPrecision
from d3tom_export.errors import CallError, D3tomError, listing
from d3tom_export.quantize.plan import QuantizeRequest

if TYPE_CHECKING:
    from d3tom_export.engines.build import EngineOptions
    from d3tom_export.engines.precision import Accumulation
    from d3tom_export.engines.record import MergeOp, Target
    from d3tom_export.engines.shapes import Range
    from d3tom_export.engines.toolkit import ToolkitName

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
            raise CallError("--vision-tower completes a checkpoint: give that with --model.")
        if self.geometry is not None:
            if self.folder is not None:
                raise CallError("--geometry makes a model with random weights and does not go with --model.")
            raw_geometry(self.geometry)
        allowed = get_args(RandomWeights) if self.geometry is not None else get_args(WeightsMode)
        if self.weights is not None and self.weights not in allowed:
            raise CallError(
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
            raise CallError(QUANTIZED_TWICE)
        if self.quantize is not None and self.quantize.format == "nvfp4" and self.half_precisions:
            raise CallError(NO_HALF_FLOAT4)
        if not self.loops:
            raise D3tomError(f"A bundle without loops runs nothing. Ask for {' or '.join(LOOPS)}.")
        if "cached" in self.loops:
            self.merge.check_cached()
            return
        for what, asked_for in (
            ("--merge-at prefill concerns", self.merge.merge_at == "prefill"),
            ("--share-prefix concerns", self.share_prefix),
            (
                "--remerge, --cached-adaptive, --no-restore-norm and --no-text-targets concern",
                self.merge.cache != CacheMergeConfig(),
            ),
        ):
            if asked_for:
                raise CallError(f"{what} the loop with a KV cache; build it with --kv-cache or --kv-cache both.")

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

    @classmethod
    def of(
        cls,
        engine: ToolkitName,
        precision: str,
        sms: Sequence[int] = (),
        merge_op: MergeOp = "plugin",
        accumulate: Accumulation = "fp32",
        ranges: Mapping[str, Range | None] | None = None,
        optimization_level: int | None = None,
        workspace_mib: int | None = None,
    ) -> EngineRequest:
        """The engines of one toolkit for compute capabilities ``sms``, or (none) the GPU's at hand.

        Refuses what cannot be built here before any work begins: a missing toolkit, an architecture it does not know.
        """
        from d3tom_export.engines.builder import check_target
        from d3tom_export.engines.cuda import gpus
        from d3tom_export.engines.record import MERGE_OPS, Target
        from d3tom_export.engines.toolkit import load_toolkit

        for name, value, known in (("--merge-op", merge_op, MERGE_OPS), ("--accumulate", accumulate, ("fp32", "any"))):
            if value not in known:
                raise CallError(f"{name} is {value!r}, expected one of {listing(known)}.")
        if precision == "int8":
            raise CallError("--precision int8 is for ONNX Runtime on the CPU; leave --engine out, or take fp16.")
        toolkit = load_toolkit(engine)
        if merge_op == "aot" and toolkit.ahead_of_time:
            raise CallError("--merge-op aot needs --engine tensorrt: TensorRT-RTX has no ahead-of-time plugins.")
        if not sms:
            try:
                sms = (gpus()[0].sm,)
            except D3tomError as error:
                raise CallError(f"Give --sm, the compute capability to build for (as --sm 89): {error}") from None
        target = Target.of(toolkit.name, sms, precision)  # type: ignore[arg-type]
        check_target(toolkit, target.sms)
        return cls((target,), merge_op, accumulate, ranges or {}, optimization_level, workspace_mib)

    @property
    def item_sizes(self) -> list[int]:
        """Bytes of a weight in the engines of each target."""
        return [4 if target.precision == "fp32" else 2 for target in self.targets]

    def check_weights(self, stored: Collection[str], quantize: QuantizeRequest | None = None) -> None:
        """Refuse weights in dtypes (as safetensors spells them), or in few bits, that a target has no use for."""
        from d3tom_export.engines.build import NO_ZERO_POINTS, check_weights

        if quantize is not None and quantize.asymmetric:
            raise CallError(NO_ZERO_POINTS)
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
        if self.stages.quantize is not None and self.source.weights in ("link", "float16"):
            raise CallError(
                f"--weights {self.source.weights} does not go with --quantize, which writes weights of the bundle's "
                "own: the quantized ones, and the others as they are stored. Leave one of them out; for others in "
                "float16 build a bundle with --weights float16 first, and give its folder with --model and --quantize."
            )
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
