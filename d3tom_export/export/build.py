"""A request in, a bundle out: refused early and in full, or written whole. The frameworks are imported in between."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import ENGINES_FOLDER
from d3tom_export.bundle.output import KEPT_SHARDS, check_output_folder, kept_folder, new_folder, sweep, work_folder
from d3tom_export.checkpoint.companions import check_companions
from d3tom_export.checkpoint.folder import Checkpoint, default_generation, open_checkpoint
from d3tom_export.checkpoint.geometry import geometry_config
from d3tom_export.checkpoint.tensors import product_shapes
from d3tom_export.config import GenerationConfig, ModelConfig
from d3tom_export.errors import D3tomError
from d3tom_export.export.preflight import Plan, nearest_folder, plan
from d3tom_export.export.request import BuildRequest
from d3tom_export.export.weights import check_linkable, demand_of, write_geometry
from d3tom_export.process import peak_memory
from d3tom_export.progress import Note, Progress, no_note, no_progress
from d3tom_export.quantize.plan import plan_of

if TYPE_CHECKING:
    from d3tom_export.export.add import BuiltEngines


@dataclass(frozen=True)
class BuildResult:
    """What a build wrote, and what that took."""

    bundle: Bundle
    """In its final place, whether it passed its self-check or not."""
    plan: Plan
    engines: BuiltEngines | None
    """None where none were asked for."""
    seconds: float
    bytes: int
    """Of all of the bundle's files."""
    linked_bytes: int
    """Of the weight files that it shares with its checkpoint."""
    peak_memory_bytes: int | None
    """The most that this process has ever held; None where the system does not tell."""

    @property
    def validation(self) -> dict[str, Any] | None:
        """The self-check's report; None where there was none."""
        return self.bundle.manifest.validation

    @property
    def passed(self) -> bool | None:
        """Whether the self-check did; None where there was none."""
        return None if self.validation is None else bool(self.validation["passed"])


@dataclass(frozen=True)
class _Opened:
    """The model that is built, before anything is written."""

    config: ModelConfig
    checkpoint: Checkpoint | None
    """None for a geometry, whose checkpoint is yet to be written."""
    generation: GenerationConfig


def _open(request: BuildRequest) -> _Opened:
    """Read what is there, and refuse what does not fit it."""
    source, merge = request.source, request.stages.merge
    folder, weights = source.checkpoint_folder, source.weights_mode
    if folder is None:
        checkpoint, config = None, geometry_config(source.name)
        merge.check_layer(config.language.n_layers)
    else:
        checkpoint = open_checkpoint(folder, clip_vocabulary=source.clip_vocabulary, vision_tower=source.vision_tower)
        config = checkpoint.config
        if checkpoint.quantized:
            raise D3tomError(
                f"{folder} is a bundle whose weights are quantized already. Give the checkpoint that it was built from."
            )
        merge.check_layer(config.language.n_layers)
        check_companions(folder)
        if weights == "link" and request.stages.quantize is None:
            check_linkable(checkpoint, request.output_folder)
    generation = default_generation(config, folder).changed(**request.generation)
    if request.engines is not None:
        request.engines.options(config, generation)
        stored = {"BF16"} if checkpoint is None else {tensor.dtype for tensor in checkpoint.tensors.values()}
        request.engines.check_weights({"F16"} if weights == "float16" else stored, request.stages.quantize)
    return _Opened(config, checkpoint, generation)


def _keep(request: BuildRequest, opened: _Opened) -> Path | None:
    """Where finished shards of quantized weights outlive an interruption; None: none do, as for a geometry."""
    if request.stages.quantize is None or opened.checkpoint is None:
        return None
    try:
        return kept_folder(request.output_folder)
    except (OSError, RuntimeError):
        return None  # another error's business


def _plan(request: BuildRequest, opened: _Opened, keep: Path | None) -> Plan:
    """What the build will do with the memory and disk that are there; refuses it where they are not."""
    item_sizes = () if request.engines is None else request.engines.item_sizes
    model = opened.config if opened.checkpoint is None else opened.checkpoint
    needs = demand_of(
        model,
        request.source.weights_mode,
        request.stages.loops,
        item_sizes,
        shares_prefix=request.stages.share_prefix,
        quantize=request.stages.quantize,
    )
    return plan(
        needs,
        request.output_folder,
        request.max_memory,
        request.self_check,
        held=0 if keep is None else sum(path.lstat().st_size for path in keep.glob(KEPT_SHARDS)),
        quantizes=request.stages.quantize is not None,
    )


def build(request: BuildRequest, progress: Progress = no_progress, note: Note = no_note) -> BuildResult:
    """Build the bundle that ``request`` asks for, and its engines.

    Everything that can be refused is refused before torch is imported and any work begins. The bundle is written to a
    folder beside its place and renamed when complete: nothing is left behind when a build fails.

    Args:
        request: What to build.
        progress: Called as the parts of the work are done.
        note: Called with sentences for the user: what killed builds had left, what this one needs,
            and what of the checkpoint could not be taken as it is.

    Raises :class:`D3tomError` where the request does not fit the model, the machine or what is there already. A bundle
    that does not pass its self-check is no error here: :attr:`BuildResult.passed` says so.
    """
    started = time.perf_counter()
    source, output = request.source, request.output_folder
    for sentence in sweep(output):
        note(sentence)
    check_output_folder(output, request.force)
    opened = _open(request)
    for told in opened.checkpoint.notes if opened.checkpoint is not None else ():
        note(told)
    keep = _keep(request, opened)
    planned = _plan(request, opened, keep)
    note(planned.describe())
    if request.stages.quantize is not None:
        layers = None if opened.checkpoint is None else opened.checkpoint.vision_layers
        note(plan_of(product_shapes(opened.config, layers), request.stages.quantize).describe())

    progress("loading torch", 0, 1)
    from d3tom_export.export.assemble import build_bundle
    from d3tom_export.export.quantized_weights import drop_kept, keeping

    weights, built = source.weights_mode, None
    with new_folder(output, request.force) as partial, ExitStack() as stack:
        checkpoint = opened.checkpoint
        if keep is not None:
            stack.enter_context(keeping(keep, partial))
        if checkpoint is None:
            assert weights == "random" or weights == "sparse"
            made_in = partial
            if request.stages.quantize is not None:
                made_in = stack.enter_context(work_folder(nearest_folder(output), output.name))
            checkpoint = write_geometry(made_in, source.name, weights, progress)
        bundle = build_bundle(
            checkpoint,
            request.stages,
            opened.generation,
            partial,
            weights=weights,
            model_name=source.name,
            check=planned.check,
            keep=keep,
            progress=progress,
            note=lambda sentence: note(f"Note: {sentence}"),
        )
        if request.engines is not None:
            from d3tom_export.export.add import build_engines_of

            # Those of the bundle that is replaced are taken over where they fit.
            built = build_engines_of(bundle, request.engines, progress, previous=output / ENGINES_FOLDER)
    if keep is not None:
        drop_kept(keep)
    size, linked = _sizes(output)
    return BuildResult(
        bundle=replace(bundle, folder=output),
        plan=planned,
        engines=built,
        seconds=time.perf_counter() - started,
        bytes=size,
        linked_bytes=linked,
        peak_memory_bytes=peak_memory(),
    )


def _sizes(folder: Path) -> tuple[int, int]:
    """Bytes of a bundle's files, and of those among them that are linked weights."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    # With links asked for, a converted file is still none.
    return size, sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.stat().st_nlink > 1)
