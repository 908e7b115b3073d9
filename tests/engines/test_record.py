"""Records of engines: written and read, damaged plans refused, differing fields named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from d3tom_export.bundle.folder import file_sha256
from d3tom_export.engines.record import (
    EngineRecord,
    Target,
    built_engines,
    check_plan,
    differing_fields,
    plan_file,
    read_record,
    read_timing_cache,
    record_file,
    write_record,
)
from d3tom_export.errors import D3tomError
from d3tom_export.stages.contract import TensorSpec

TARGET = Target("tensorrt-rtx", (89,), "fp16")


@pytest.fixture
def record(tmp_path: Path) -> EngineRecord:
    folder = tmp_path / TARGET.folder
    folder.mkdir(parents=True)
    plan = plan_file(folder, "front")
    plan.write_bytes(bytes(range(256)) * 8)
    record = EngineRecord(
        stage="front",
        key="front",
        loop="uncached",
        target=TARGET,
        content={"version": "1.7", "merge_op": "onnx", "weights": "", "plugin": {}, "sizes": {"V": "1:2:3"}},
        inputs=(TensorSpec("prompt_embeddings", "float32", ("B", "P", 32)),),
        outputs=(TensorSpec("hidden", "float16", ("B", "L", 32)),),
        profiles=({"prompt_embeddings": ((1, 2, 32), (1, 5, 32), (1, 9, 32))},),
        plugin_layers=0,
        plan_bytes=2048,
        plan_sha256=file_sha256(plan),
    )
    write_record(folder, record)
    return record


def test_a_record_is_read_as_it_was_written(record: EngineRecord, tmp_path: Path) -> None:
    assert read_record(tmp_path / TARGET.folder, "front") == record
    assert built_engines(tmp_path) == {TARGET: {"front": record}}
    assert check_plan(tmp_path / TARGET.folder, record).name == "front.plan"


def test_no_record_no_plan_or_another_schema_is_no_engine(record: EngineRecord, tmp_path: Path) -> None:
    folder = tmp_path / TARGET.folder
    assert read_record(folder, "back") is None
    text = record_file(folder, "front").read_text()
    record_file(folder, "front").write_text(text.replace('"schema_version": 2', '"schema_version": 1'))
    assert read_record(folder, "front") is None
    record_file(folder, "front").write_text(text)
    plan_file(folder, "front").unlink()
    assert read_record(folder, "front") is None


def test_a_record_with_fields_missing_says_what_to_do(record: EngineRecord, tmp_path: Path) -> None:
    folder = tmp_path / TARGET.folder
    record_file(folder, "front").write_text('{"schema_version": 2, "stage": "front"}')
    with pytest.raises(D3tomError, match=r"not an engine's record.*build its engines again"):
        read_record(folder, "front")


def test_a_truncated_plan_and_a_changed_one_are_told_apart(record: EngineRecord, tmp_path: Path) -> None:
    folder = tmp_path / TARGET.folder
    plan = plan_file(folder, "front")
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-1])
    with pytest.raises(D3tomError, match=r"truncated: it has 2,047 bytes, expected 2,048"):
        check_plan(folder, record)
    plan.write_bytes(whole[:-1] + b"\0")
    with pytest.raises(D3tomError, match="is damaged: its sha256"):
        check_plan(folder, record)
    plan.unlink()
    with pytest.raises(D3tomError, match="0 bytes"):
        check_plan(folder, record)


def test_differing_fields_are_named_with_both_values() -> None:
    built = {"version": "1.7", "sizes": {"V": "1:2:3", "K": "1:1:3"}, "graph": "a" * 64}
    wanted = {"version": "1.8", "sizes": {"V": "1:2:3", "K": "1:2:3"}, "graph": "b" * 64, "plugin": {}}
    assert differing_fields(built, wanted) == [
        f'graph ("{"a" * 19}...", now "{"b" * 19}...")',
        "plugin (null, now {})",
        'sizes.K ("1:1:3", now "1:2:3")',
        'version ("1.7", now "1.8")',
    ]
    assert differing_fields(built, built) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("target",), []),
        (("target", "sms"), 89),
        (("target", "sms"), ["89"]),
        (("target", "toolkit"), "cuda"),
        (("target", "precision"), "bf16"),  # not that of the folder
        (("content",), 5),
        (("content", "merge_op"), "shell"),
        (("content", "sizes"), [1]),
        (("inputs",), "x"),
        (("inputs", 0, "axes"), [[1]]),
        (("profiles", 0, "prompt_embeddings"), [[1]]),
        (("plan_bytes",), "2048"),
        (("plan_bytes",), -1),
        (("plan_sha256",), "../x"),
        (("key",), "../front"),
        (("loop",), "other"),
    ],
)
def test_a_record_of_wrong_kinds_is_one_paragraph(
    record: EngineRecord, tmp_path: Path, place: tuple[str | int, ...], value: object
) -> None:
    path = record_file(tmp_path / TARGET.folder, "front")
    raw = json.loads(path.read_text())
    inner = raw
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(D3tomError, match=r"front\.json is not an engine's record.*build its engines again"):
        built_engines(tmp_path)


def test_only_records_that_are_listed_as_they_are_count(record: EngineRecord, tmp_path: Path) -> None:
    folder = tmp_path / TARGET.folder
    paths = (record_file(folder, "front"), plan_file(folder, "front"))
    listed = {
        path.relative_to(tmp_path).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }
    assert built_engines(tmp_path, listed) == {TARGET: {"front": record}}
    assert built_engines(tmp_path, {}) == {}
    assert built_engines(tmp_path, {paths[1].relative_to(tmp_path).as_posix(): {}}) == {}
    paths[0].write_text(paths[0].read_text().replace('"loop": "uncached"', '"loop": null'))
    assert built_engines(tmp_path, listed) == {}


def test_records_plans_and_timing_caches_are_regular_files_of_the_bundle(record: EngineRecord, tmp_path: Path) -> None:
    folder = tmp_path / TARGET.folder
    timing = folder.parent / "timing.cache"
    assert read_timing_cache(timing) == b""
    timing.write_bytes(b"times")
    assert read_timing_cache(timing) == b"times"
    for path in (timing, record_file(folder, "front"), plan_file(folder, "front")):
        content = path.read_bytes()
        path.unlink()
        for make, says in ((os.mkfifo, "is a named pipe"), (lambda p: p.symlink_to("/etc/hostname"), "leads out of")):
            make(path)  # type: ignore[operator]
            with pytest.raises(D3tomError, match=says):
                read_timing_cache(timing) if path is timing else (
                    read_record(folder, "front"),
                    check_plan(folder, record),
                )
            path.unlink()
        path.write_bytes(content)
