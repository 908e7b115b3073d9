"""``build`` from Python asks for what the command asks for, and refuses what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import d3tom_export as d3
from d3tom_export.api import building
from d3tom_export.export import build as build_module
from d3tom_export.export.request import BuildRequest
from tests.conftest import Invoke


class _Stop(Exception):  # noqa: N818
    """Instead of a build."""

    def __init__(self, request: BuildRequest) -> None:
        super().__init__()
        self.request = request


def _stop(request: BuildRequest, *_: object) -> None:
    raise _Stop(request)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, []),
        ({"layer": 2, "ratio": 0.9, "output": "x", "force": True}, "--layer 2 --ratio 0.9 --output x --force"),
        (
            {"model": "m", "vision_tower": "t", "weights": "copy", "clip_vocabulary": False, "drop_newline": False},
            "--model m --vision-tower t --weights copy --full-vocabulary --keep-newline",
        ),
        (
            {"kv_cache": "both", "merge_at": "prefill", "remerge": "per-block", "cached_adaptive": True,
             "share_prefix": True, "restore_norm": False, "text_targets": False},
            "--kv-cache both --merge-at prefill --remerge per-block --cached-adaptive --share-prefix "
            "--no-restore-norm --no-text-targets",
        ),
        ({"kv_cache": True, "quantize": "int4"}, "--kv-cache --quantize int4"),
        (
            {"precision": "int8", "self_check": 0, "max_memory": 1 << 30},
            "--precision int8 --self-check 0 --max-memory 1",
        ),
        (
            {"schedule": "fixed", "select": "uniform", "deciders": "looking", "aggregate": "mean",
             "positions": "original"},
            "--schedule fixed --select uniform --deciders looking --aggregate mean --positions original",
        ),
        (
            {"gen_length": 32, "step_schedule": "shift", "shift": 0.5, "commit": "factor", "factor": 2.0, "top_k": 0},
            "--gen-length 32 --step-schedule shift --shift 0.5 --commit factor --factor 2 --top-k 0",
        ),
        (
            {"engine": "tensorrt-rtx", "sm": [120, 89], "precision": "fp16", "merge_op": "onnx", "batch": (1, 2, 4),
             "answer_tokens": 64, "accumulate": "any", "optimization_level": 2, "workspace_mib": 64},
            "--engine tensorrt-rtx --sm 120 --sm 89 --precision fp16 --merge-op onnx --batch 1:2:4 "
            "--answer-tokens 64 --accumulate any --optimization-level 2 --workspace 64",
        ),
    ],
)  # fmt: skip
def test_the_request_is_the_commands(
    given: dict[str, Any], options: Any, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "build", _stop)
    monkeypatch.setattr(building, "build_bundle", _stop)
    ran = invoke("build", "--debug", *(options.split() if options else []))
    assert isinstance(ran.exception, _Stop), ran.output
    with pytest.raises(_Stop) as stopped:
        d3.build(**given)
    assert stopped.value.request == ran.exception.request


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layer": 99}, "outside this model"),
        ({"ratio": 1.0}, r"outside \[0, 1\)"),
        ({"kv_cache": "only"}, "kv_cache is 'only', expected one of False, True, 'both'"),
        ({"precision": "fp4"}, "precision is 'fp4'"),
        ({"merge_at": "prefill"}, "--merge-at prefill concerns the loop with a KV cache"),
        ({"share_prefix": True}, "--share-prefix concerns"),
        ({"remerge": "per-block"}, "--remerge, .* concern the loop with a KV cache"),
        ({"geometry": "lavida-8b", "model": "m"}, "does not go with --model"),
        ({"vision_tower": "t"}, "--vision-tower completes a checkpoint"),
        ({"quantize": "int4", "weights": "float16"}, "does not go with --quantize"),
        ({"quantize": "int4", "precision": "int8"}, "Take one of them"),
        ({"sm": 89, "batch": 2}, "sms, ranges concerns engines"),
        ({"engine": "tensorrt-rtx", "precision": "int8"}, "for ONNX Runtime on the CPU"),
        ({"engine": "tensorrt-rtx", "merge_op": "aot", "sm": 89}, "needs --engine tensorrt"),
        ({"engine": "tensorrt-rtx", "merge_op": "none", "sm": 89}, "--merge-op is 'none'"),
        ({"engine": "tensorrt-rtx", "batch": (2, 1, 4), "sm": 89}, "1 <= min <= opt <= max"),
        ({"gen_length": 10, "block_length": 3}, "does not divide"),
        ({"model": "absent"}, "absent"),
    ],
)
def test_what_cannot_be_built_leaves_nothing_behind(
    given: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(d3.D3tomError, match=says):
        d3.build(**given)
    assert not list(tmp_path.iterdir())


def test_a_keyword_of_no_build() -> None:
    with pytest.raises(TypeError, match="'gen_lenght' is no setting"):
        d3.build(gen_lenght=4)  # type: ignore[call-arg]


@pytest.mark.slow
def test_a_bundle_is_built_checked_and_asked(checkpoint_folder: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    built = d3.build(checkpoint_folder, layer=1, ratio=0.7, output=tmp_path / "bundle", gen_length=6, note=notes.append)
    assert (built.passed, built.bundle.folder) == (True, tmp_path / "bundle")
    assert any("Needs up to" in note for note in notes)
    with d3.open(tmp_path / "bundle") as model:
        assert model.describe().validated
        assert len(model.answer(None, "What?", raw_text=True).token_ids) == 6
    with pytest.raises(d3.D3tomError, match="exists"):
        d3.build(checkpoint_folder, layer=1, ratio=0.7, output=tmp_path / "bundle")
