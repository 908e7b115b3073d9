"""Engines of a bundle's stages: what is there and still fits is kept, the rest is built, the manifest tells of both."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from d3tom_export.bundle.folder import Bundle, file_sha256, listed_files, write_manifest
from d3tom_export.bundle.manifest import ENGINES_FOLDER, stage_file, weights_sha256
from d3tom_export.bundle.output import abandoned_engines, clear_half_written, locked, unlist
from d3tom_export.checkpoint.quantized import QuantizedTensor, with_quantized
from d3tom_export.checkpoint.stored import stored_tensors
from d3tom_export.config import QUANT_FORMATS, QuantFormat
from d3tom_export.engines.builder import BuilderSettings, BuiltPlan, build_plan
from d3tom_export.engines.graph import EngineGraph, engine_graph
from d3tom_export.engines.precision import Accumulation, PrecisionReport
from d3tom_export.engines.record import (
    MERGE_OPS,
    PRECISIONS,
    EngineRecord,
    MergeOp,
    Target,
    built_engines,
    check_plan,
    differing_fields,
    graph_file,
    layers_file,
    plan_file,
    read_record,
    read_timing_cache,
    record_file,
    write_record,
)
from d3tom_export.engines.shapes import EngineShapes, Profile, axis_ranges
from d3tom_export.engines.stages import engine_stages, engine_tensors, served_sizes, stage_profiles
from d3tom_export.engines.toolkit import Toolkit, load_toolkit
from d3tom_export.errors import D3tomError, listing
from d3tom_export.plugins.aot_plugin import aot_identity, register_aot_merge
from d3tom_export.plugins.merge_plugin import plugin_identity, register_merge_plugin
from d3tom_export.progress import Progress, no_progress
from d3tom_export.stages.contract import StageSpec
from d3tom_export.trust.files import relative_name
from d3tom_export.trust.replace import exchange, replace_file
from d3tom_export.trust.tensors import StoredTensor

PLUGINS_PER_MERGE: dict[MergeOp, int] = {"plugin": 1, "aot": 2, "onnx": 0}
"""Plugin layers for a merge node; ahead-of-time ones have one more for each of its row inputs."""
"""Plugin layers that a merge node becomes."""
_GRAPH_ENDS = tuple(f".{precision}-{merge_op}.onnx" for precision in PRECISIONS for merge_op in MERGE_OPS)
_FIRST_WITH_BFLOAT16 = 80
"""Compute capability from which on GPUs know bfloat16."""
_FIRST_WITH_FORMAT: dict[QuantFormat, int] = {"int4": 80, "int8": 75, "fp8": 89, "nvfp4": 100}
"""Compute capability from which on TensorRT takes weights in a format; TensorRT-RTX 1.7.1 was asked for each."""

NO_ZERO_POINTS = (
    "TensorRT takes no zero points, and asymmetric int4 has one for each block: such a bundle is for ONNX Runtime. "
    "Build one without --quantize-asymmetric for engines."
)

_PHASE_SECONDS = 2.0
"""Between two words about the builder's phases."""


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built, whatever their target."""

    shapes: EngineShapes
    merge_op: MergeOp = "plugin"
    accumulate: Accumulation = "fp32"
    settings: BuilderSettings = field(default_factory=BuilderSettings)


@dataclass(frozen=True)
class StageOutcome:
    """What became of one stage's engine."""

    record: EngineRecord
    reused: bool
    """Whether it was there already and followed from the same content."""
    stale: tuple[str, ...]
    """The fields in which an engine that was there differs from what is wanted; empty where there was none."""
    precision: PrecisionReport

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.record.key,
            "target": asdict(self.record.target),
            "reused": self.reused,
            "stale": list(self.stale),
            "bytes": self.record.plan_bytes,
            "plugin_layers": self.record.plugin_layers,
            "precision": self.precision.to_json(),
        }


def _content(
    bundle: Bundle,
    toolkit: Toolkit,
    path: Path,
    graph: EngineGraph,
    sizes: dict[str, str],
    settings: BuilderSettings,
    plugin: dict[str, Any],
) -> dict[str, Any]:
    """The key by which an engine is found again."""
    return {
        "version": toolkit.version,
        "graph": file_sha256(path),
        "weights": weights_sha256(listed_files(bundle.folder)),
        "merge_op": graph.merge_op,
        "plugin": plugin if graph.merge_nodes else {},
        "sizes": sizes,
        "settings": asdict(settings),
    }


def _timing_file(engines: Path, toolkit: Toolkit, target: Target) -> Path:
    return engines / f"timing-{toolkit.name}-{toolkit.version}-{'-'.join(f'sm{sm}' for sm in target.sms)}.cache"


@dataclass(frozen=True)
class _Job:
    """One engine to be had."""

    key: str
    spec: StageSpec
    graph: EngineGraph
    graph_path: Path
    profiles: tuple[Profile, ...]
    content: dict[str, Any]


class _TargetBuild:
    """The engines of one target, assembled in a folder beside the final one and put in its place when whole.

    Finished engines of ``abandoned`` folders, which killed builds left, are taken over.
    """

    def __init__(
        self, bundle: Bundle, target: Target, toolkit: Toolkit, previous: Path | None, abandoned: Sequence[Path]
    ) -> None:
        self._bundle, self._target, self._toolkit = bundle, target, toolkit
        self._final = bundle.folder / target.folder
        self._sources = [
            self._final,
            *(folder / self._final.name for folder in abandoned),
            *([previous / Path(target.folder).name] if previous else []),
        ]
        self._partial = self._final.with_name(f".partial-{os.getpid()}-{uuid.uuid4().hex[:8]}") / self._final.name

    def __enter__(self) -> _TargetBuild:
        self._partial.mkdir(parents=True)
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        """Keep what was finished, even if a later stage failed: the next build starts from there."""
        self._put_in_place()
        shutil.rmtree(self._partial.parent)

    def _put_in_place(self) -> None:
        finished = {
            path.stem for path in self._partial.glob("*.plan") if record_file(self._partial, path.stem).exists()
        }
        for path in self._partial.iterdir():
            if _key_of(path) not in finished:
                path.unlink()
        if not self._final.is_dir():
            if finished:
                self._partial.replace(self._final)
            return
        for path in self._final.iterdir():
            if _key_of(path) not in finished:
                _share(path, self._partial / path.name)
        if not _same_files(self._partial, self._final):
            # Killed between two steps, the target has its former engines or the new ones, and the manifest is silent.
            unlist(self._bundle.folder, lambda name: name.startswith(f"{self._target.folder}/"))
            if not exchange(self._partial, self._final):
                shutil.rmtree(self._final)
                self._partial.replace(self._final)

    def find(self, job: _Job) -> tuple[EngineRecord | None, tuple[str, ...]]:
        """An engine that fits, copied into the new folder; or the fields in which the one that is there does not."""
        stale: tuple[str, ...] = ()
        for folder in self._sources:
            try:
                record = read_record(folder, job.key)
            except D3tomError:
                if folder == self._final:
                    raise
                continue  # it was being written
            if record is None:
                continue
            differing = differing_fields(record.content, job.content)
            if differing:
                stale = stale or tuple(differing)
                continue
            try:
                check_plan(folder, record)
            except D3tomError:
                stale = stale or ("plan (damaged)",)
                continue
            for file in (plan_file, record_file, layers_file):
                _share(file(folder, job.key), file(self._partial, job.key))
            return record, ()
        return None, stale

    def build(self, job: _Job, settings: BuilderSettings, progress: Progress) -> EngineRecord:
        timing = _timing_file(self._final.parent, self._toolkit, self._target)
        built = build_plan(
            self._toolkit,
            job.graph_path,
            job.profiles,
            self._target.sms,
            plan_file(self._partial, job.key),
            merge_op=job.graph.merge_op,
            plugin_layers=plugin_layers(job.graph),
            settings=settings,
            timing_cache=read_timing_cache(timing),
            progress=progress,
        )
        if built.timing_cache is not None:
            _rewrite(self._bundle.folder, timing, built.timing_cache)
        return self._store(job, built)

    def _store(self, job: _Job, built: BuiltPlan) -> EngineRecord:
        plan = plan_file(self._partial, job.key)
        record = EngineRecord(
            stage=job.spec.name,
            key=job.key,
            loop=job.spec.loop,
            target=self._target,
            content=job.content,
            inputs=engine_tensors(job.spec.inputs, self._target.precision),
            outputs=engine_tensors(job.spec.outputs, self._target.precision),
            profiles=job.profiles,
            plugin_layers=built.plugin_layers,
            plan_bytes=plan.stat().st_size,
            plan_sha256=file_sha256(plan),
        )
        table = {"network": [asdict(layer) for layer in built.layers], "engine": built.engine_layers}
        layers_file(self._partial, job.key).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        write_record(self._partial, record)
        return record


def _is_kept(name: str) -> bool:
    """Whether a build of engines leaves the file of this name as it is: all but engines and their graphs."""
    return not name.startswith(f"{ENGINES_FOLDER}/") and not name.endswith(_GRAPH_ENDS)


def _share(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _rewrite(bundle: Path, path: Path, content: bytes | memoryview) -> None:
    """Put a file into a bundle, whose manifest may list an earlier one."""
    if path.exists():
        unlist(bundle, lambda name: name == relative_name(path, bundle))
    replace_file(path, content)


def _key_of(path: Path) -> str:
    """The stage that a file of an engine belongs to."""
    return path.name.partition(".")[0]


def _same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files under the same names: links or copies of them."""

    def contents(folder: Path) -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_ino, path.stat().st_dev) for path in folder.iterdir()}

    return contents(one) == contents(other)


def build_engines(
    bundle: Bundle,
    targets: Sequence[Target],
    options: EngineOptions,
    *,
    previous: Path | None = None,
    progress: Progress = no_progress,
) -> list[StageOutcome]:
    """Give ``bundle`` the engines of every stage for each of ``targets``, and list them in its manifest.

    Args:
        bundle: Its folder is written to; one build at a time.
        targets: What to build for.
        options: Shapes, merge op and settings.
        previous: The ``engines`` folder of a bundle that this one replaces; what fits is taken from there.
        progress: Called as stages are done.

    Engines that are there and follow from the same content are kept. What was finished stays when a later one fails.
    Raises :class:`D3tomError` where a toolkit is missing or refuses a graph.
    """
    stored = with_quantized(stored_tensors(bundle.folder), bundle.folder).values()
    dtypes = {tensor.dtype for tensor in stored if isinstance(tensor, StoredTensor)}
    quantized = [tensor for tensor in stored if isinstance(tensor, QuantizedTensor)]
    if any(tensor.zero is not None for tensor in quantized):
        raise D3tomError(NO_ZERO_POINTS)
    for target in targets:
        check_weights(target, dtypes, {tensor.format for tensor in quantized})
    toolkits = {target.toolkit: load_toolkit(target.toolkit) for target in targets}
    outcomes: list[StageOutcome] = []
    stages = engine_stages(bundle.manifest.stages, bundle.config, bundle.manifest.merge)
    bundle.check_graphs()
    total = len(targets) * len(stages)
    with locked(bundle.folder) as alone:
        abandoned = abandoned_engines(bundle.folder) if alone else []
        unchanged = {name: entry for name, entry in listed_files(bundle.folder).items() if _is_kept(name)}
        try:
            for target in targets:
                toolkit = toolkits[target.toolkit]
                plugin = _register_plugin(toolkit, target, options.merge_op)
                with _TargetBuild(bundle, target, toolkit, previous, abandoned) as folder:
                    for key, spec in stages.items():
                        job = _job(bundle, target, toolkit, options, plugin, key, spec)
                        record, stale = folder.find(job)
                        what = f"{'keeping' if record else 'building'} {key} for {target.gpus} in {target.precision}"
                        progress(what, len(outcomes), total)
                        reused = record is not None
                        if record is None:
                            report = _phases(progress, what, len(outcomes), total)
                            record = folder.build(job, options.settings, report)
                        outcomes.append(StageOutcome(record, reused, stale, job.graph.precision))
        finally:
            if alone:
                clear_half_written(bundle.folder)
            _drop_unused_graphs(bundle)
            write_manifest(bundle.folder, bundle.manifest, unchanged)
    progress("engines built", total, total)
    return outcomes


def check_weights(target: Target, stored: Collection[str], formats: Collection[QuantFormat] = ()) -> None:
    """Refuse what TensorRT would refuse minutes later: numbers that a GPU does not have, its weights' among them.

    ``stored`` are the weights' dtypes, as safetensors spells them, ``formats`` those of the quantized ones.
    """
    for form in QUANT_FORMATS:
        first = _FIRST_WITH_FORMAT[form]
        old = "+".join(f"SM{sm}" for sm in target.sms if sm < first)
        if form in formats and old:
            others = [each for each in QUANT_FORMATS if _FIRST_WITH_FORMAT[each] <= min(target.sms)]
            raise D3tomError(
                f"TensorRT has weights in {form} from SM{first} on, and engines for {old} were asked for. Leave those "
                f"GPUs out, or build a bundle without --quantize or with {listing(others)}."
            )
    without = "+".join(f"SM{sm}" for sm in target.sms if sm < _FIRST_WITH_BFLOAT16)
    if not without:
        return
    if target.precision == "bf16":
        raise D3tomError(f"GPUs of {without} have no bfloat16. Build their engines with --precision fp16.")
    if "BF16" in stored:
        remedy = "Build a bundle with --weights float16, and engines from that."
        if formats:
            remedy = (
                "Build a bundle with --weights float16 and without --quantize first, which is a checkpoint in float16: "
                "give its folder with --model and --quantize."
            )
        raise D3tomError(
            f"GPUs of {without} have no bfloat16, in which this model's weights are stored, and TensorRT takes "
            f"them as they are. {remedy}"
        )


def _drop_unused_graphs(bundle: Bundle) -> None:
    """Remove graphs that no engine is built from any more."""
    used = {
        graph_file(record.key, target, record.content["merge_op"])
        for target, records in built_engines(bundle.folder).items()
        for record in records.values()
    }
    unused = [path for path in bundle.folder.glob("*.onnx") if path.name not in used and not _is_kept(path.name)]
    if unused:
        names = {path.name for path in unused}
        unlist(bundle.folder, names.__contains__)
    for path in unused:
        path.unlink()


def _phases(progress: Progress, what: str, done: int, total: int) -> Progress:
    """The builder's phases as part of the whole, for engines that take their time."""
    spoke = time.monotonic()

    def report(phase: str, steps_done: int, steps: int) -> None:
        nonlocal spoke
        if time.monotonic() - spoke > _PHASE_SECONDS:
            spoke = time.monotonic()
            progress(f"{what}: {phase} {steps_done}/{steps}", done, total)

    return report


def plugin_layers(graph: EngineGraph) -> int:
    """Plugin layers that an engine built from ``graph`` has."""
    sums = graph.merge_rows if graph.merge_op == "aot" else 0
    return graph.merge_nodes * PLUGINS_PER_MERGE[graph.merge_op] + sums


def _register_plugin(toolkit: Toolkit, target: Target, merge_op: MergeOp) -> dict[str, Any]:
    """Make what ``merge_op`` needs known to ``toolkit``, and tell what identifies it."""
    if merge_op == "onnx":
        return {}
    if merge_op == "aot":
        register_aot_merge(toolkit.trt, target.sms[0])
        identity = aot_identity()
    else:
        register_merge_plugin(toolkit.trt, target.sms)
        identity = plugin_identity()
    return {"identity": identity, "triton": version("triton")}


def _job(
    bundle: Bundle,
    target: Target,
    toolkit: Toolkit,
    options: EngineOptions,
    plugin: dict[str, Any],
    key: str,
    spec: StageSpec,
) -> _Job:
    """Write the graph that the engine is built from, and what identifies the engine."""
    manifest = bundle.manifest
    graph = engine_graph(bundle.folder / stage_file(key), spec, target.precision, options.merge_op, options.accumulate)
    path = bundle.folder / graph_file(key, target, graph.merge_op)
    if not path.is_file() or path.read_bytes() != graph.model:
        _rewrite(bundle.folder, path, graph.model)
    axes = axis_ranges(options.shapes, manifest.merge, manifest.generation, kv_cache=spec.loop == "cached")
    content = _content(bundle, toolkit, path, graph, served_sizes(spec, axes), options.settings, plugin)
    return _Job(key, spec, graph, path, stage_profiles(spec, axes), content)
