"""A bundle with engines for the double of TensorRT, in a copy of the real bundle."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from d3tom_export.backends import tensorrt
from d3tom_export.backends.tensorrt import TensorRTBackend
from d3tom_export.bundle.folder import Bundle, listed_files, write_manifest
from d3tom_export.bundle.manifest import stage_file, weights_sha256
from d3tom_export.config import Loop
from d3tom_export.engines.cuda import Gpu
from d3tom_export.engines.graph import engine_graph
from d3tom_export.engines.record import EnginePrecision, EngineRecord, MergeOp, Target, plan_file, write_record
from d3tom_export.engines.shapes import SHAPE_INPUTS, EngineShapes, Range, axis_ranges
from d3tom_export.engines.stages import engine_stages, engine_tensors, stage_profiles
from d3tom_export.engines.toolkit import Toolkit
from d3tom_export.stages.contract import StageSpec
from tests.backends.fake_cuda import FakeDevice
from tests.backends.fake_tensorrt import FakeTensorRT, fake_plan

VERSION = "11.4.0.106"
ADA = Gpu(0, "Fake RTX 4090", 89)
WIDE = EngineShapes(
    batch=Range(1, 1, 4),
    visual_tokens=Range(1, 100, 400),
    text_tokens=Range(1, 30, 200),
    answer_tokens=Range(1, 8, 32),
    views=Range(1, 3, 6),
)
BUNDLED = replace(WIDE, visual_tokens=Range(1, 1008, 1100), answer_tokens=Range(1, 48, 48))
"""For the bundled model's pictures and answers."""


def own_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """A copy of ``bundle``, so that engines do not get into the one that other tests look at."""
    shutil.copytree(bundle.folder, folder, dirs_exist_ok=True)
    return replace(bundle, folder=folder, files=None)  # whatever engines it gets count


_graphs: dict[tuple[bytes, StageSpec, str], bytes] = {}


def _engine_graph(path: Path, spec: StageSpec, precision: EnginePrecision) -> bytes:
    """What `engine_graph` makes of the graph at ``path``, whose copies lie in many bundles: made once."""
    key = path.read_bytes(), spec, precision
    if key not in _graphs:
        _graphs[key] = engine_graph(path, spec, precision, "onnx").model
    return _graphs[key]


def write_engines(
    bundle: Bundle,
    target: Target,
    *,
    shapes: EngineShapes = WIDE,
    plugin: str | None = None,
    merge_op: MergeOp = "plugin",
    version: str = VERSION,
    source: Bundle | None = None,
) -> None:
    """Give a :func:`own_bundle` engines; with ``plugin``, an identity, merges hold what ``merge_op`` says.

    They run graphs as engines have them: in float32, lower precisions being played by rounding between stages, or in
    the target's own precision, made from the float32 graphs of ``source``.
    """
    folder = bundle.folder / target.folder
    folder.mkdir(parents=True)
    manifest = bundle.manifest
    for key, spec in engine_stages(manifest.stages, bundle.config, manifest.merge).items():
        axes = axis_ranges(shapes, manifest.merge, manifest.generation, kv_cache=spec.loop == "cached")
        profiles = stage_profiles(spec, axes)
        graph = bundle.folder / f"{key}.fake-engine.onnx"
        if not graph.exists():
            precision = target.precision if source else "fp32"
            graph.write_bytes(_engine_graph((source or bundle).folder / stage_file(key), spec, precision))
        inputs = engine_tensors(spec.inputs, target.precision)
        outputs = engine_tensors(spec.outputs, target.precision)
        plan = fake_plan(
            graph.resolve(),
            spec.name,
            {tensor.name: tensor.dtype for tensor in inputs},
            {tensor.name: tensor.dtype for tensor in outputs},
            shape_inputs=[tensor.name for tensor in inputs if tensor.name in SHAPE_INPUTS],
            profiles=profiles,
        )
        plan_file(folder, key).write_bytes(plan)
        holds = plugin is not None and spec.name in ("merge", "prompt_merge")
        content = {
            "merge_op": merge_op if holds else "onnx",
            "version": version,
            "sizes": {},
            "weights": weights_sha256(listed_files(bundle.folder)),
            "plugin": {"identity": plugin} if holds else {},
        }
        sha256 = hashlib.sha256(plan).hexdigest()
        write_record(
            folder,
            EngineRecord(
                spec.name, key, spec.loop, target, content, inputs, outputs, profiles, int(holds), len(plan), sha256
            ),
        )
    write_manifest(bundle.folder, manifest, listed_files(bundle.folder))


class Machine:
    """A machine with TensorRT and GPUs, all doubles, under the backend's own doors."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, gpus: Sequence[Gpu] = (ADA,), *, version: str = VERSION
    ) -> None:
        self.device = FakeDevice(gpus[0])
        self.trt: FakeTensorRT | None = None
        self.opened: list[Gpu] = []

        def load(name: str) -> Toolkit:
            self.trt = FakeTensorRT(self.device, rtx=name == "tensorrt-rtx")
            return Toolkit(name, self.trt, version)  # type: ignore[arg-type]

        def open_device(gpu: Gpu) -> FakeDevice:
            self.opened.append(gpu)
            self.device = FakeDevice(gpu)
            assert self.trt is not None
            self.trt.device = self.device
            return self.device

        monkeypatch.setattr(tensorrt, "load_toolkit", load)
        monkeypatch.setattr(tensorrt, "gpus", lambda: list(gpus))
        monkeypatch.setattr(tensorrt, "CudaDevice", open_device)

    def backend(self, bundle: Bundle, loop: Loop = "uncached", **options: object) -> TensorRTBackend:
        return TensorRTBackend(bundle, loop, **options)  # type: ignore[arg-type]
