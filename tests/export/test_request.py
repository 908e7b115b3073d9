"""What a build is asked for is refused when it is said, and build() refuses before it imports torch or writes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.bundled import DEFAULT_MODEL, bundled_model
from d3tom_export.checkpoint.geometry import DEFAULT_GEOMETRY
from d3tom_export.config import LOOPS, CacheMergeConfig, GenerationConfig, MergeConfig
from d3tom_export.errors import CallError, D3tomError
from d3tom_export.export import assemble, preflight
from d3tom_export.export.build import build
from d3tom_export.export.preflight import SelfCheck
from d3tom_export.export.request import BuildRequest, ModelSource, StageRequest
from d3tom_export.quantize.plan import QuantizeRequest

MERGE = MergeConfig(1, 0.7)
STAGES = StageRequest(MERGE)


def test_a_source_has_a_name_a_folder_and_a_way_for_its_weights(tmp_path: Path) -> None:
    bundled, own, geometry = ModelSource(), ModelSource(tmp_path / "mine"), ModelSource(geometry=DEFAULT_GEOMETRY)
    assert [each.name for each in (bundled, own, geometry)] == [DEFAULT_MODEL, "mine", DEFAULT_GEOMETRY]
    assert [each.checkpoint_folder for each in (bundled, own, geometry)] == [bundled_model(), tmp_path / "mine", None]
    assert [each.weights_mode for each in (bundled, own, geometry)] == ["copy", "link", "random"]
    assert ModelSource(weights="float16").weights_mode == "float16"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"folder": Path("mine"), "geometry": DEFAULT_GEOMETRY}, "does not go with --model"),
        ({"geometry": "lavida-9b"}, "no geometry that this tool knows"),
        ({"geometry": DEFAULT_GEOMETRY, "weights": "link"}, "one of random, sparse"),
        ({"weights": "sparse"}, "one of link, copy, float16"),
    ],
)
def test_a_source_refuses_what_does_not_go_together(given: dict[str, Any], says: str) -> None:
    with pytest.raises(D3tomError, match=says):
        ModelSource(**given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"loops": ()}, "runs nothing"),
        ({"loops": ("cached", "cached")}, "once at most"),
        ({"precisions": ("fp8",)}, "int8, fp16, bf16 once"),
        ({"merge": MergeConfig(1, 0.7, "adaptive", "uniform"), "loops": LOOPS}, "cache"),
    ],
)
def test_stages_refuse_what_cannot_be_written(given: dict[str, Any], says: str) -> None:
    with pytest.raises(D3tomError, match=says):
        StageRequest(**{"merge": MERGE} | given)


def test_graphs_in_float32_are_always_written() -> None:
    assert (STAGES.cpu_precisions, STAGES.half_precisions) == (("fp32",), ())
    stages = StageRequest(MERGE, precisions=("bf16", "int8", "fp16"))
    assert (stages.cpu_precisions, stages.half_precisions) == (("fp32", "int8"), ("fp16", "bf16"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"generation": {"length": 8}}, "no setting length"),
        ({"self_check": -1}, "Give 0 for none"),
        ({"max_memory": 0}, "No build fits"),
    ],
)
def test_a_request_refuses_what_means_nothing(given: dict[str, Any], says: str) -> None:
    with pytest.raises(D3tomError, match=says):
        BuildRequest(ModelSource(), STAGES, **given)


@pytest.mark.parametrize(
    ("loops", "end"), [(("uncached",), ""), (("cached",), "-cached"), (LOOPS, "-both")], ids=["", "cached", "both"]
)
def test_the_output_is_named_for_what_is_built(loops: Any, end: str) -> None:
    request = BuildRequest(ModelSource(), StageRequest(MERGE, loops))
    assert request.output_folder == Path(f"{DEFAULT_MODEL}-d3tom-l1-r0.7{end}")
    assert replace(request, output=Path("mine")).output_folder == Path("mine")


def test_a_request_is_made_and_refused_without_a_framework(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from d3tom_export.config import MergeConfig
from d3tom_export.errors import CallError, D3tomError
from d3tom_export.export.request import BuildRequest, ModelSource, StageRequest
from d3tom_export.quantize.plan import QuantizeRequest

request = BuildRequest(ModelSource(), StageRequest(MergeConfig(99, 0.7)), Path({str(tmp_path / "out")!r}))
print("request:", *sys.modules)
from d3tom_export.export.build import build
try:
    build(request)
except D3tomError as error:
    print("refused:", error)
print("build:", *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {line.split(":")[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
    assert not loaded["request"] & {"torch", "onnx", "onnx_ir", "onnxruntime", "numpy"}
    assert not loaded["build"] & {"torch", "onnx", "onnx_ir", "onnxruntime"}
    assert "layer" in loaded["refused"]
    assert not list(tmp_path.iterdir())


def test_build_returns_what_it_built(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export is a copy here: what is asked of it, and what build() makes of it."""
    asked: list[Any] = []

    def copied(checkpoint: Any, request: Any, generation: GenerationConfig, folder: Path, **rest: Any) -> Bundle:
        asked.extend((request, generation, rest.pop("check"), rest["weights"], rest["model_name"]))
        shutil.copytree(bundle.folder, folder, dirs_exist_ok=True)
        return load_bundle(folder)

    monkeypatch.setattr(assemble, "build_bundle", copied)
    notes: list[str] = []
    source, output = ModelSource(bundle.folder, weights="copy"), tmp_path / "out"
    cache = CacheMergeConfig(remerge="per-block")
    request = BuildRequest(source, StageRequest(replace(MERGE, cache=cache), LOOPS), output, self_check=0)
    result = build(replace(request, generation={"gen_length": 4, "block_length": 2}), note=notes.append)
    assert asked[0] == request.stages
    assert (asked[1].gen_length, asked[1].block_length) == (4, 2)
    assert asked[2:] == [SelfCheck(0, streamed=False), "copy", bundle.folder.name]
    assert result.bundle.folder == output
    assert result.bundle.manifest == load_bundle(output).manifest
    assert (result.validation, result.passed, result.engines) == (None, None, None)
    assert result.bytes == sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    assert result.linked_bytes == 0
    assert result.seconds > 0
    assert len(notes) == 1
    assert notes[0] == result.plan.describe()
    with pytest.raises(D3tomError, match="exists"):
        build(request)


@pytest.mark.parametrize("name", [".", "n" * 255])
def test_any_output_that_a_bundle_may_have_is_built(
    name: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(checkpoint: Any, request: Any, generation: GenerationConfig, folder: Path, **rest: Any) -> Bundle:
        assert rest["keep"] is None  # no weight is quantized
        shutil.copytree(bundle.folder, folder, dirs_exist_ok=True)
        return load_bundle(folder)

    monkeypatch.setattr(assemble, "build_bundle", copied)
    here = Path(shutil.copytree(bundle.folder, tmp_path / "here"))
    monkeypatch.chdir(here)
    output = Path(name) if name == "." else tmp_path / name
    build(BuildRequest(ModelSource(bundle.folder, weights="copy"), STAGES, output, force=True, self_check=0))
    assert load_bundle(here if name == "." else output).manifest == bundle.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"here", output.name} - {""})


def test_a_format_that_is_unknown_is_refused_with_those_that_are() -> None:
    with pytest.raises(CallError, match=r"'int3'.*int4, int8, fp8, nvfp4"):
        QuantizeRequest("int3")  # type: ignore[arg-type]


def test_disk_that_an_interrupted_build_holds_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = preflight.free_disk(tmp_path)
    needs = replace(preflight.demand({"one": (1,)}, 1, LOOPS, 0), export=0, disk=free + 10**9)
    monkeypatch.setattr(preflight, "free_disk", lambda output: free)  # others write to the disk meanwhile
    assert preflight.plan(needs, tmp_path / "out", None, 0, held=10**9, quantizes=True).disk == free
    with pytest.raises(D3tomError, match="of disk and") as refusal:
        preflight.plan(needs, tmp_path / "out", None, 0, held=10**9 - 1, quantizes=True)
    assert "--weights link" not in str(refusal.value)
    with pytest.raises(D3tomError, match="--weights link for a checkpoint"):
        preflight.plan(needs, tmp_path / "out", None, 0)
