"""Which of a bundle's engines to run, and everything that is refused before TensorRT sees a plan.

A plan is machine code for one GPU architecture and one version of TensorRT: what does not fit is told apart here, where
it can be named, and not by TensorRT, which would fail in words of its own or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from d3tom_export.bundle.folder import Bundle, listed_files
from d3tom_export.bundle.manifest import weights_sha256
from d3tom_export.config import Loop
from d3tom_export.engines.cuda import Gpu
from d3tom_export.engines.record import EngineRecord, Target, built_engines, check_plan
from d3tom_export.engines.stages import engine_stages
from d3tom_export.engines.toolkit import Toolkit, ToolkitName
from d3tom_export.errors import D3tomError, listing


def build_command(bundle: Bundle, toolkit: ToolkitName, sms: Sequence[int], precision: str | None) -> str:
    """The command that adds the engines that are missing."""
    wanted = f" --precision {precision}" if precision else ""
    gpus = " ".join(f"--sm {sm}" for sm in sms)
    return f"`d3tom-export build --bundle {bundle.folder} --engine {toolkit} {gpus}{wanted}`"


def check_architecture(toolkit: Toolkit, gpu: Gpu) -> None:
    """Refuse a GPU that ``toolkit`` has no kernels for."""
    supported = toolkit.architectures
    if supported is not None and gpu.sm not in supported:
        raise D3tomError(
            f"{toolkit.name} {toolkit.version} does not run on this GPU, {gpu}: it knows "
            f"{listing(f'SM{sm}' for sm in supported)}. Run with --backend tensorrt and engines of that, or with "
            "--backend onnxruntime."
        )


def choose_target(bundle: Bundle, toolkit: Toolkit, gpus: Sequence[Gpu], precision: str | None) -> tuple[Gpu, Target]:
    """The GPU to run on, and the engines to run: those of ``toolkit`` for its architecture.

    The first of ``gpus`` that the bundle has engines for. Raises :class:`D3tomError` where there is none, or where
    several precisions were built and ``precision`` names none of them.
    """
    engines = [target for target in built_engines(bundle.folder, bundle.files) if target.toolkit == toolkit.name]
    gpu = next((gpu for gpu in gpus if any(gpu.sm in target.sms for target in engines)), gpus[0])
    check_architecture(toolkit, gpu)
    fitting = [target for target in engines if gpu.sm in target.sms and precision in (None, target.precision)]
    if not fitting:
        everything = listing(str(target) for target in built_engines(bundle.folder, bundle.files)) or "none at all"
        wanted = f" in {precision}" if precision else ""
        raise D3tomError(
            f"{bundle.folder} has no engines of {toolkit.name}{wanted} for this GPU, {gpu}; it has {everything}. "
            f"Add them with {build_command(bundle, toolkit.name, [gpu.sm], precision)}"
            + ("." if toolkit.ahead_of_time else " on a machine with such a GPU.")
        )
    precisions = dict.fromkeys(target.precision for target in fitting)
    if len(precisions) > 1:
        raise D3tomError(
            f"{bundle.folder} has engines of {toolkit.name} for SM{gpu.sm} in "
            f"{listing(precisions)}. Choose one with --precision."
        )
    return gpu, min(fitting, key=lambda target: len(target.sms))  # the plan with the least that is not for it


def checked_engines(
    bundle: Bundle, loop: Loop, target: Target, toolkit: Toolkit
) -> dict[str, tuple[EngineRecord, Path]]:
    """Record and plan of each stage of ``loop`` by stage name, found fit to be deserialized.

    Registers the merge plugin where an engine holds it. Raises :class:`D3tomError` for a stage without engine, an
    engine of other weights, of another TensorRT or of another plugin, and a plan that is truncated or damaged.
    """
    records = built_engines(bundle.folder, bundle.files).get(target, {})
    again = build_command(bundle, target.toolkit, target.sms, target.precision)
    stages = engine_stages(bundle.manifest.stages, bundle.config, bundle.manifest.merge)
    keys = {spec.name: key for key, spec in stages.items() if spec.loop in (None, loop)}
    if missing := [key for key in keys.values() if key not in records]:
        raise D3tomError(
            f"The engines in {bundle.folder / target.folder} are incomplete: there is none of {listing(missing)}. "
            f"Build the rest with {again}."
        )
    used = {name: records[key] for name, key in keys.items()}
    weights = weights_sha256(listed_files(bundle.folder))
    for record in used.values():
        _check_content(bundle.folder / target.folder, record, weights, toolkit, again)
    if any(record.needs_plugin for record in used.values()):
        _register_plugin(used, toolkit, again)
    folder = bundle.folder / target.folder
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        plans = list(pool.map(lambda record: check_plan(folder, record, bundle.hashes), used.values()))
    if bundle.hashes is not None:
        bundle.hashes.save()
    return {name: (record, plan) for (name, record), plan in zip(used.items(), plans, strict=True)}


def _check_content(folder: Path, record: EngineRecord, weights: str, toolkit: Toolkit, again: str) -> None:
    built = record.content.get("version")
    if built != toolkit.version:
        raise D3tomError(
            f"The engine of {record.key} in {folder} was built by {toolkit.name} {built}, and {toolkit.version} is "
            f"installed here; a plan only runs on the version that built it. Build it again with {again}, or install "
            f'that version: `pip install "{toolkit.name}=={built}"`.'
        )
    if record.content.get("weights") != weights:
        raise D3tomError(
            f"The engine of {record.key} in {folder} was built from other weights than this bundle's. "
            f"Build it again with {again}."
        )


def _register_plugin(records: dict[str, EngineRecord], toolkit: Toolkit, again: str) -> None:
    """Make the merge plugin known to ``toolkit``: a plan that holds it is not deserialized without."""
    onnx = "or once more with --merge-op onnx, whose engines need no plugin"
    try:
        from d3tom_export.plugins.library import register_merge_runtime
        from d3tom_export.plugins.merge_plugin import plugin_identity
    except ImportError as error:
        raise D3tomError(
            f"These engines hold the merge plugin, which cannot be imported here ({error}). Install what is missing, "
            f"or build them with {again} {onnx}."
        ) from None
    here = plugin_identity()
    for record in records.values():
        built = record.content.get("plugin", {}).get("identity") if record.needs_plugin else here
        if built != here:
            raise D3tomError(
                f"The engine of {record.key} holds the merge plugin {_short(built)}, and this d3tom-export has "
                f"{_short(here)}: their kernels may differ. Build it again with {again}, {onnx}."
            )
    register_merge_runtime(toolkit.trt)


def _short(identity: str | None) -> str:
    return identity[:12] if identity else "of no known identity"
