"""Engines of whole bundles: built for GPUs that are not here, kept while they fit, whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.bundle.output import check_output_folder, locked
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import default_generation, open_checkpoint
from d3tom_export.checkpoint.stored import stored_tensors
from d3tom_export.config import MergeConfig
from d3tom_export.engines import build as engine_build
from d3tom_export.engines.build import EngineOptions, StageOutcome, build_engines, check_weights
from d3tom_export.engines.builder import BuilderSettings, build_plan
from d3tom_export.engines.record import MergeOp, Target, built_engines, layers_file, plan_file
from d3tom_export.engines.shapes import Range, default_shapes
from d3tom_export.errors import D3tomError
from d3tom_export.export.assemble import build_bundle, write_stages
from d3tom_export.export.preflight import SelfCheck
from d3tom_export.export.request import StageRequest
from d3tom_export.plugins.archive import MAGIC
from tests.conftest import raw_config, write_checkpoint

SM89 = Target("tensorrt-rtx", (89,), "fp16")


def _options(bundle: Bundle, merge_op: MergeOp = "onnx", visual_tokens: Range | None = None) -> EngineOptions:
    return EngineOptions(
        default_shapes(bundle.config, bundle.manifest.generation, visual_tokens=visual_tokens), merge_op
    )


def _by_key(outcomes: list[StageOutcome]) -> dict[str, StageOutcome]:
    return {outcome.record.key: outcome for outcome in outcomes}


@pytest.fixture(scope="module")
def with_engines(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The synthetic bundle with engines for SM89 in fp16, the merge as standard layers."""
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(bundle.folder, folder)
    copy = load_bundle(folder)
    outcomes = build_engines(copy, [SM89], _options(copy))
    assert not any(outcome.reused or outcome.stale for outcome in outcomes)
    return copy


@pytest.fixture
def a_copy(with_engines: Bundle, tmp_path: Path) -> Bundle:
    """A bundle with engines that a test may change."""
    shutil.copytree(with_engines.folder, tmp_path / "copy")
    return load_bundle(tmp_path / "copy")


@pytest.mark.parametrize(
    ("precision", "sms"), [("fp16", (89, 120)), pytest.param("bf16", (89,), marks=pytest.mark.slow)]
)
def test_the_bundled_models_stages_of_both_loops_for_every_architecture(
    tiny_bundle: Bundle, tmp_path: Path, precision: str, sms: tuple[int, ...]
) -> None:
    """The plugin is in exactly the stages that merge, once a merge node, for every architecture.

    Keys and values of a layer are one search's: with a node for each there would be twice as many.
    """
    bundle = Bundle(shutil.copytree(tiny_bundle.folder, tmp_path / "tiny"), tiny_bundle.manifest, tiny_bundle.config)
    targets = [Target("tensorrt-rtx", sms, precision)]  # type: ignore[arg-type]
    outcomes = build_engines(bundle, targets, _options(bundle, "plugin"))
    later = bundle.config.language.n_layers - bundle.manifest.merge.layer - 1
    merges = {"merge": 1, "cached_merge": later}
    for outcome in outcomes:
        record = outcome.record
        assert record.plugin_layers == merges.get(record.key, 0)
        plan = plan_file(bundle.folder / record.target.folder, record.key).read_bytes()
        assert (b"D3ToMMerge" in plan) == (record.key in merges)
        table = json.loads(layers_file(bundle.folder / record.target.folder, record.key).read_text())
        assert sum(layer["type"] == "PLUGIN_V3" for layer in table["network"]) == record.plugin_layers
        # Each has brought its kernels; a plan has a plugin's fields twice, for one architecture as for two.
        assert plan.count(MAGIC) == 2 * record.plugin_layers
    # Weights are bfloat16 in their files behind a cast: the builder folds it, so a plan holds them once.
    stored = stored_tensors(bundle.folder)
    for record in (outcome.record for outcome in outcomes if outcome.record.key == "back"):
        weights = sum(math.prod(stored[name].shape) for name in bundle.manifest.stage_weights["back"])
        assert 2 * weights < record.plan_bytes < 1.3 * 4 * weights
    # A prompt runs on the steps' engines.
    assert {outcome.record.key for outcome in outcomes} == set(bundle.manifest.stages) - {"prefill"}
    assert {len(outcome.record.profiles) for outcome in outcomes if outcome.record.key == "cached_back"} == {2}
    assert all(
        outcome.reused for outcome in build_engines(load_bundle(bundle.folder), targets, _options(bundle, "plugin"))
    )
    # Standard layers take the plugin's place; engines without a merge are the same for either.
    for outcome in build_engines(load_bundle(bundle.folder), targets, _options(bundle, "onnx")):
        record = outcome.record
        assert outcome.reused == (record.key not in merges)
        assert record.plugin_layers == 0
        assert b"D3ToMMerge" not in plan_file(bundle.folder / record.target.folder, record.key).read_bytes()


@pytest.mark.parametrize(("precision", "says"), [("fp16", "--weights float16"), ("bf16", "--precision fp16")])
def test_bfloat16_is_refused_for_gpus_without_it(tiny_bundle: Bundle, precision: str, says: str) -> None:
    target = Target("tensorrt", (75,), precision)  # type: ignore[arg-type]
    with pytest.raises(D3tomError, match=f"SM75 have no bfloat16.*{says}"):
        build_engines(tiny_bundle, [target], _options(tiny_bundle))


@pytest.mark.slow
def test_a_bundle_in_float16_is_held_to_its_own_weights(tmp_path: Path) -> None:
    """The bundled model is stored in bfloat16; TensorRT reads what was made of it, for any GPU."""
    checkpoint = open_checkpoint(bundled_model())
    generation = default_generation(checkpoint.config, checkpoint.folder)
    bundle = build_bundle(
        checkpoint, StageRequest(MergeConfig(2, 0.9)), generation, tmp_path, weights="float16", check=SelfCheck(1)
    )
    assert bundle.manifest.validation is not None
    assert bundle.manifest.validation["passed"]
    assert bundle.manifest.bundled_digest is None  # not the packaged weights: `validate` takes the bundle's own
    stored = {tensor.dtype for tensor in stored_tensors(tmp_path).values()}
    assert stored == {"F16"}
    check_weights(Target("tensorrt", (75,), "fp16"), stored)
    outcomes = build_engines(load_bundle(tmp_path), [SM89], _options(bundle))
    assert {outcome.record.key for outcome in outcomes} == set(bundle.manifest.stages) - {"prefill"}


def test_engines_of_standard_layers_name_no_plugin(with_engines: Bundle) -> None:
    for key, record in built_engines(with_engines.folder)[SM89].items():
        assert record.plugin_layers == 0
        assert b"D3ToMMerge" not in plan_file(with_engines.folder / SM89.folder, key).read_bytes()


@pytest.mark.slow
def test_low_precision_halves_the_weights_in_the_plan(tmp_path: Path) -> None:
    """Weights are bfloat16 in their files behind a cast: the builder must fold it, not keep both."""
    folder = write_checkpoint(tmp_path / "wide", raw_config(d_model=512, mlp_hidden_size=1536, n_layers=3), shards=1)
    state = load_file(folder / "model.safetensors")
    save_file({name: weight.bfloat16() for name, weight in state.items()}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    (tmp_path / "bundle").mkdir()
    generation = default_generation(checkpoint.config, folder)
    bundle = write_stages(checkpoint, StageRequest(MergeConfig(1, 0.7)), generation, tmp_path / "bundle")
    full, half = (
        _by_key(build_engines(bundle, [replace(SM89, precision=precision)], _options(bundle)))  # type: ignore[arg-type]
        for precision in ("fp32", "fp16")
    )
    stored = stored_tensors(bundle.folder)
    for key in ("front", "merge", "back"):
        weights = 4 * sum(math.prod(stored[name].shape) for name in bundle.manifest.stage_weights[key])
        saved = full[key].record.plan_bytes - half[key].record.plan_bytes
        assert 0.45 * weights < saved < 0.55 * weights
        assert half[key].record.plan_bytes < weights  # code included


def test_an_unchanged_bundle_keeps_its_engines(a_copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "build_plan", _never)
    before = {path: path.read_bytes() for path in (a_copy.folder / SM89.folder).iterdir()}
    outcomes = build_engines(a_copy, [SM89], _options(a_copy))
    assert all(outcome.reused and not outcome.stale for outcome in outcomes)
    assert {path: path.read_bytes() for path in (a_copy.folder / SM89.folder).iterdir()} == before


def _never(*args: object, **options: object) -> None:
    raise AssertionError("an engine that fits was built again")


def test_a_change_is_named_and_rebuilds_only_what_it_concerns(a_copy: Bundle) -> None:
    outcomes = _by_key(build_engines(a_copy, [SM89], _options(a_copy, visual_tokens=Range(1, 20, 90))))
    assert outcomes["vision"].reused
    assert not outcomes["merge"].reused
    assert 'sizes.V ("1:' in " ".join(outcomes["merge"].stale)
    assert {field.split()[0] for field in outcomes["merge"].stale} <= {"sizes.V", "sizes.L", "sizes.K"}


def test_settings_belong_to_the_content(a_copy: Bundle) -> None:
    options = replace(_options(a_copy), settings=BuilderSettings(workspace_mib=64))
    (outcome, *_) = build_engines(a_copy, [SM89], options)
    assert outcome.stale == ("settings.workspace_mib (null, now 64)",)


def test_a_damaged_engine_is_built_again(a_copy: Bundle) -> None:
    plan = plan_file(a_copy.folder / SM89.folder, "front")
    whole = plan.read_bytes()
    plan.unlink()
    plan.write_bytes(whole[: len(whole) // 2])
    outcomes = _by_key(build_engines(a_copy, [SM89], _options(a_copy)))
    assert outcomes["front"].stale == ("plan (damaged)",)
    assert not outcomes["front"].reused
    assert outcomes["back"].reused
    assert plan.stat().st_size == pytest.approx(len(whole), rel=0.01)


def test_the_manifest_lists_engines_and_their_graphs(a_copy: Bundle) -> None:
    listed = json.loads((a_copy.folder / MANIFEST_FILE).read_text())["files"]
    found = {path.relative_to(a_copy.folder).as_posix() for path in a_copy.folder.rglob("*") if path.is_file()}
    assert found == {*listed, MANIFEST_FILE}
    assert f"{SM89.folder}/merge.plan" in listed
    assert "merge.fp16-onnx.onnx" in listed
    check_output_folder(a_copy.folder, force=True)  # all of it is ours to replace


def test_graphs_of_engines_that_are_gone_go_too(a_copy: Bundle) -> None:
    assert (a_copy.folder / "merge.fp16-onnx.onnx").is_file()
    build_engines(a_copy, [SM89], _options(a_copy, "plugin"))
    left = {path.name for path in a_copy.folder.glob("*.fp16-*.onnx")}
    merging = ("merge", "cached_merge")
    stages = a_copy.manifest.stages.keys() - {"prefill"}
    assert left == {f"{key}.fp16-{'plugin' if key in merging else 'onnx'}.onnx" for key in stages}
    load_bundle(a_copy.folder)


def test_a_damaged_engine_does_not_keep_the_bundle_from_loading(a_copy: Bundle) -> None:
    """Engines are checked by whoever opens one: ONNX Runtime has no need of them."""
    plan_file(a_copy.folder / SM89.folder, "front").write_bytes(b"")
    assert load_bundle(a_copy.folder).manifest == a_copy.manifest


def _fail_at(stage: str) -> Callable[..., object]:
    def build(toolkit: object, graph: Path, *args: object, **options: object) -> object:
        if graph.name.startswith(stage):
            raise D3tomError("the builder gave up")
        return build_plan(toolkit, graph, *args, **options)  # type: ignore[arg-type]

    return build


def test_what_was_finished_stays_when_a_later_stage_fails(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(bundle.folder, tmp_path / "copy")
    copy = load_bundle(folder)
    monkeypatch.setattr(engine_build, "build_plan", _fail_at("merge"))
    with pytest.raises(D3tomError, match="gave up"):
        build_engines(copy, [SM89], _options(copy))
    monkeypatch.undo()
    assert set(built_engines(folder)[SM89]) == {"vision", "embed", "front"}
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    load_bundle(folder)
    check_output_folder(folder, force=True)
    outcomes = _by_key(build_engines(copy, [SM89], _options(copy)))
    assert [key for key, outcome in outcomes.items() if outcome.reused] == ["vision", "embed", "front"]


def test_one_build_at_a_time(a_copy: Bundle) -> None:
    with (
        locked(a_copy.folder),
        pytest.raises(D3tomError, match="Another process is building engines"),
    ):
        build_engines(a_copy, [SM89], _options(a_copy))
    assert all(outcome.reused for outcome in build_engines(a_copy, [SM89], _options(a_copy)))


def test_engines_of_a_replaced_bundle_are_taken_over(
    bundle: Bundle, with_engines: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = load_bundle(shutil.copytree(bundle.folder, tmp_path / "fresh"))
    monkeypatch.setattr(engine_build, "build_plan", _never)
    outcomes = build_engines(fresh, [SM89], _options(fresh), previous=with_engines.folder / "engines")
    assert all(outcome.reused for outcome in outcomes)
    assert set(built_engines(fresh.folder)[SM89]) == set(fresh.manifest.stages) - {"prefill"}


def test_a_missing_toolkit_is_told_before_anything_is_written(a_copy: Bundle) -> None:
    before = sorted(a_copy.folder.rglob("*"))
    with pytest.raises(D3tomError, match="need the package tensorrt"):
        build_engines(a_copy, [Target("tensorrt", (89,), "fp16")], _options(a_copy))
    assert sorted(a_copy.folder.rglob("*")) == before
