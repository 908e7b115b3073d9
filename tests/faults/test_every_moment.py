"""Builds killed at every operation on files, of bundles and of engines: whole or not there, and the next succeeds."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.bundle import folder as bundles
from d3tom_export.bundle.folder import Bundle, listed_files, load_bundle, write_manifest
from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.bundle.output import check_output_folder, new_folder, sweep
from d3tom_export.engines import build as engine_build
from d3tom_export.engines.build import EngineOptions, StageOutcome, build_engines
from d3tom_export.engines.builder import BuiltPlan
from d3tom_export.engines.graph import EngineGraph
from d3tom_export.engines.precision import PrecisionReport
from d3tom_export.engines.record import MergeOp, Target, built_engines, check_plan
from d3tom_export.engines.shapes import default_shapes
from d3tom_export.engines.toolkit import Toolkit
from d3tom_export.trust import replace
from d3tom_export.trust.files import write_file
from tests.faults.moments import fail_at_every_moment, kill_at_every_moment

SM89 = Target("tensorrt-rtx", (89,), "fp16")


@pytest.fixture(autouse=True)
def _two_stages_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every moment of a whole bundle's ten stages would take minutes and show nothing more."""
    monkeypatch.setattr(bundles, "check_stages", lambda *arguments: None)


def _small(bundle: Bundle, folder: Path) -> None:
    """The bundle with two of its stages: enough of each kind of file."""
    for path in bundle.folder.iterdir():
        if path.is_file() and path.suffix != ".onnx":
            os.link(path, folder / path.name)
    stages = {key: bundle.manifest.stages[key] for key in ("front", "merge")}
    for key in stages:
        shutil.copyfile(bundle.folder / f"{key}.onnx", folder / f"{key}.onnx")
    weights = {key: bundle.manifest.stage_weights[key] for key in stages}
    manifest = dataclasses.replace(bundle.manifest, stages=stages, stage_weights=weights)
    write_manifest(folder, manifest, listed_files(bundle.folder))


def _contents(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def _without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replace, "_renameat2", lambda: lambda *arguments: -1)
    monkeypatch.setattr(replace.ctypes, "get_errno", lambda: errno.EINVAL)


@pytest.mark.parametrize(
    ("force", "exchange"),
    [
        (False, True),
        pytest.param(True, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
    ids=["new", "replaced", "replaced by renames"],
)
def test_a_build_killed_at_any_moment(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool, exchange: bool
) -> None:
    if not exchange:
        _without_exchange(monkeypatch)
    place = tmp_path / "place"
    output = place / "out"
    place.mkdir()

    def build() -> None:
        sweep(output)
        with new_folder(output, force) as partial:
            _small(bundle, partial)

    def start() -> dict[str, int]:
        shutil.rmtree(output, ignore_errors=True)
        if not force:
            return {}
        output.mkdir()
        _small(bundle, output)
        return _contents(output)

    moments, seen = 0, set()
    before = start()
    for _ in kill_at_every_moment(build, str(place)):
        moments += 1
        if os.path.lexists(output):
            load_bundle(output)
            seen.add("former" if _contents(output) == before else "new")
        else:
            seen.add("none")
            if force:
                sweep(output)  # between the two renames: the next run begins with this
                assert _contents(output) == before
                seen.add("restored")
        if moments % 2:  # the next build succeeds,
            shutil.rmtree(output, ignore_errors=True) if not force else None
            build()
        else:  # or the next one but one
            sweep(output)
        assert [path.name for path in place.iterdir()] in ([], ["out"])
        before = start()
    assert moments > 25
    assert seen >= ({"former", "new"} if force else {"none", "new"})
    assert ("restored" in seen) == (not exchange)


@dataclasses.dataclass
class _Factory:
    """Stands for the toolkits: graphs and plans follow from what is asked for, as real ones do, and take no time."""

    version: int = 1

    def graph(self, path: Path, spec: Any, precision: str, merge_op: MergeOp, accumulate: str) -> EngineGraph:
        text = f"{path.name} {precision} {merge_op} {self.version}"
        merges = int("merge" in path.name)
        return EngineGraph(text.encode(), path, merges, merges, merge_op, PrecisionReport(precision))

    def plan(self, toolkit: Any, graph: Path, profiles: Any, sms: Any, plan: Path, **options: Any) -> BuiltPlan:
        what = graph.read_bytes()
        write_file(plan, b"plan of " + what)
        return BuiltPlan((), None, options["plugin_layers"], b"times of " + what)


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> _Factory:
    made = _Factory()
    monkeypatch.setattr(engine_build, "engine_graph", made.graph)
    monkeypatch.setattr(engine_build, "build_plan", made.plan)
    monkeypatch.setattr(engine_build, "load_toolkit", lambda name: Toolkit(name, None, "1.0"))
    monkeypatch.setattr(engine_build, "_register_plugin", lambda *arguments: {})
    return made


@pytest.mark.parametrize(
    ("former", "exchange"),
    [
        (None, True),
        pytest.param("onnx", True, marks=pytest.mark.slow),
        pytest.param("onnx", False, marks=pytest.mark.slow),
        pytest.param("plugin", True, marks=pytest.mark.slow),
    ],
    ids=["none", "other graphs", "other graphs by renames", "graphs of other names"],
)
def test_a_build_of_engines_killed_at_any_moment(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factory: _Factory,
    former: MergeOp | None,
    exchange: bool,
) -> None:
    """Of a bundle without engines; with those of other graphs; with those of graphs under other names."""
    if not exchange:
        _without_exchange(monkeypatch)
    kept = tmp_path / "kept"
    kept.mkdir()
    _small(bundle, kept)
    opened = load_bundle(kept)
    shapes = default_shapes(opened.config, opened.manifest.generation)

    def add(folder: Path, merge_op: MergeOp, version: int) -> list[StageOutcome]:
        factory.version = version
        return build_engines(dataclasses.replace(opened, folder=folder), [SM89], EngineOptions(shapes, merge_op))

    if former:
        add(kept, former, 1)
    folder = tmp_path / "bundle"
    moments, taken_over = 0, set()

    def start() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder, copy_function=os.link)

    start()
    for _ in kill_at_every_moment(lambda: add(folder, "onnx", 2), str(folder)):
        moments += 1
        load_bundle(folder)
        check_output_folder(folder, force=True)
        for target, records in built_engines(folder).items():
            for record in records.values():
                check_plan(folder / target.folder, record)
        if former and exchange:  # the engines that were there are there, or the new ones are
            assert set(built_engines(folder)[SM89]) == set(opened.manifest.stages) - {"prefill"}
        outcomes = add(folder, "onnx", 2)
        taken_over.add(sum(outcome.reused for outcome in outcomes))
        files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert found == {*files, MANIFEST_FILE}
        assert not [name for name in found if "partial" in name]
        assert {path.name for path in (folder / "engines").iterdir() if path.is_dir()} == {Path(SM89.folder).name}
        start()
    assert moments > 40
    assert taken_over == {0, 1, 2}  # what a killed build had finished is kept


@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
def test_a_disk_that_is_full_from_any_moment_on(bundle: Bundle, tmp_path: Path, force: bool) -> None:
    place = tmp_path / "place"
    output = place / "out"
    place.mkdir()
    if force:
        output.mkdir()
        _small(bundle, output)
    before = _contents(output)

    def build() -> None:
        with new_folder(output, force) as partial:
            _small(bundle, partial)

    moments = 0
    for said in fail_at_every_moment(build, str(place), errno.ENOSPC):
        moments += 1
        assert said.startswith("D3tomError: ")
        assert "No space left on device" in said
        assert [path.name for path in place.iterdir()] == (["out"] if force else [])
        assert _contents(output) == before
    assert moments > 8
    load_bundle(output)  # the last one had space


def test_a_disk_that_is_full_while_engines_are_built(bundle: Bundle, tmp_path: Path, factory: _Factory) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    _small(bundle, folder)
    opened = load_bundle(folder)
    options = EngineOptions(default_shapes(opened.config, opened.manifest.generation), "onnx")
    moments = 0
    for said in fail_at_every_moment(lambda: build_engines(opened, [SM89], options), str(folder), errno.ENOSPC):
        moments += 1
        assert "No space left on device" in said
        load_bundle(folder)
        assert not [path for path in folder.rglob("*") if "partial" in path.name and "engines" not in path.parts]
    assert moments > 8
    assert set(built_engines(folder)[SM89]) == set(opened.manifest.stages) - {"prefill"}
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
