"""The oracle and ONNX Runtime against recorded runs of the released behaviour."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.checkpoint.folder import Checkpoint, open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import Loop
from d3tom_export.errors import D3tomError
from d3tom_export.export.assemble import write_stages
from d3tom_export.export.request import StageRequest
from d3tom_export.parity.recorded import RecordedRun, case_model, load_recorded_run
from d3tom_export.parity.replay import validate_recorded
from d3tom_export.parity.validate import BACKEND_TOLERANCE, FAMILIES_TOLERANCE, ORACLE_TOLERANCE
from tests.conftest import OWN_FAMILIES, OWN_GOLDEN, recorded_runs, recorded_runs_of_families

CASES = [pytest.param(folder, id=folder.name) for folder in recorded_runs()]
FAMILIES = [pytest.param(folder, id=f"{folder.parent.name}-{folder.name}") for folder in recorded_runs_of_families()]


class _Opened(NamedTuple):
    """A recorded run and the model that it was made with."""

    run: RecordedRun
    checkpoint: Checkpoint
    tolerance: float


def _open(folder: Path) -> _Opened:
    family, changed = case_model(folder)
    checkpoint = open_checkpoint(folder, family=family, changed=changed)
    run = load_recorded_run(folder, checkpoint.config.language.n_layers)
    return _Opened(run, checkpoint, ORACLE_TOLERANCE if family is None else FAMILIES_TOLERANCE)


@pytest.mark.parametrize("folder", [*CASES, *FAMILIES])
def test_oracle(folder: Path) -> None:
    run, checkpoint, tolerance = _open(folder)
    backend = PyTorchBackend(load_model(checkpoint), run.merge, kv_cache=run.kv_cache)
    report = validate_recorded(run, backend, checkpoint.config, tolerance)
    assert report.passed, report
    assert report.steps == len(run.tokens)
    assert (report.max_relative_embedding_error > 0) == (run.picture is not None)


# PyTorch takes all of them, above; ONNX Runtime, which needs an export of each, those that differ most.
_SOON = ("cached", "gqa-two-blocks", "plain-adaptive", "llada-v-banned-ids")


@pytest.mark.parametrize(
    "folder",
    [pytest.param(*c.values, id=c.id, marks=() if c.id in _SOON else pytest.mark.slow) for c in (*CASES, *FAMILIES)],
)
def test_onnxruntime(folder: Path, tmp_path: Path) -> None:
    run, checkpoint, _ = _open(folder)
    loop: Loop = "cached" if run.kv_cache else "uncached"
    bundle = write_stages(checkpoint, StageRequest(run.merge, (loop,)), run.generation, tmp_path)
    backend = OnnxRuntimeBackend(bundle, loop, device="cpu")
    report = validate_recorded(run, backend, checkpoint.config, BACKEND_TOLERANCE)
    assert report.passed, report
    assert report.steps == len(run.tokens)


@pytest.mark.parametrize(
    ("case", "changed", "says"),
    [
        ("llada-v/banned-ids", {"suppressed_token_ids": []}, "other tokens were committed|were committed"),
        ("llada-v/stop-in-first-of-two-blocks", {"stop_sequences": []}, "16 steps ran, expected 8"),
        ("llada-v/stop-in-first-of-two-blocks", {"returned": [1]}, "was returned, expected \\[1\\]"),
        ("lavida-dream/prefix-margin-shift", {"shift": 3.0}, "positions were committed"),
    ],
)
def test_a_run_without_what_its_family_does_departs(
    case: str, changed: dict[str, object], says: str, tmp_path: Path
) -> None:
    run, checkpoint, tolerance = _open(_with_case(OWN_FAMILIES / case, tmp_path / "case", **changed))
    backend = PyTorchBackend(load_model(checkpoint), run.merge, kv_cache=run.kv_cache)
    report = validate_recorded(run, backend, checkpoint.config, tolerance)
    assert not report.passed
    assert any(re.search(says, problem) for problem in report.problems), report.problems


def test_a_case_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    folder = _with_case(OWN_GOLDEN / "cached", tmp_path / "case", backbone="lavida-o")
    with pytest.raises(D3tomError, match=r"backbone 'lavida-o', which is no family"):
        case_model(folder)


@pytest.mark.parametrize("folder", [case for case in CASES if "cached" not in str(case.id)])
def test_merge_of_the_recorded_rows(folder: Path) -> None:
    """The merge by itself: recorded residual rows and normed rows in, recorded merged rows out."""
    import torch

    from d3tom_export.merging.merge import merge_tokens

    run = load_recorded_run(folder)
    recorded = sorted({int(name.split(".")[1]) for name in run.trace if name.endswith(".merged")})
    assert recorded or run.merge.schedule == "none"
    for index in recorded:
        hidden, normed, merged = (run.trace[f"merge.{index}.{name}"] for name in ("hidden", "normed", "merged"))
        kept, visual = run.kept[index], run.visual_positions
        rows = merge_tokens(
            torch.from_numpy(hidden[:, visual]), torch.from_numpy(normed[:, visual]), torch.from_numpy(kept[None])
        )
        survivors = np.flatnonzero(run.trace[f"merge.{index}.keep"])
        at = np.searchsorted(survivors, visual[kept])
        np.testing.assert_allclose(rows.numpy()[0], merged[0, at], rtol=1e-5, atol=1e-5)


def test_a_damaged_recording_is_refused(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "case"
    shutil.copytree(OWN_GOLDEN / "plain-adaptive", folder)
    (folder / "case.json").write_text('{"gen_length": 16}')
    with pytest.raises(D3tomError, match=r"lacks block_length, merge_layer"):
        load_recorded_run(folder)
    shutil.copy(OWN_GOLDEN / "plain-adaptive" / "case.json", folder)
    trace = folder / "trace.safetensors"
    trace.write_bytes(trace.read_bytes()[:-100])
    with pytest.raises(D3tomError, match="truncated"):
        load_recorded_run(folder)
    with pytest.raises(D3tomError, match="not a folder"):
        load_recorded_run(tmp_path / "nothing")


def _with_case(folder: Path, target: Path, **changes: object) -> Path:
    import json
    import shutil

    shutil.copytree(folder, target)
    case = json.loads((target / "case.json").read_text()) | changes
    (target / "case.json").write_text(json.dumps(case))
    return target


def test_the_cached_ratio_is_fixed_whatever_the_flag(tmp_path: Path) -> None:
    """The release passes no step to the cached merge, so the adaptive flag changes nothing there."""
    folder = _with_case(OWN_GOLDEN / "cached", tmp_path / "case", adaptive=True)
    checkpoint = open_checkpoint(folder)
    run = load_recorded_run(folder, checkpoint.config.language.n_layers)
    backend = PyTorchBackend(load_model(checkpoint), run.merge, kv_cache=True)
    assert validate_recorded(run, backend, checkpoint.config, ORACLE_TOLERANCE).passed


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gen_length": 8, "block_length": 8}, "tokens is"),
        ({"merge_layer": None}, "merge_layer None"),
        ({"prompt_length": 7}, "inputs_embeds is"),
        ({"merge_layer": -1}, "merge_layer -1"),
        ({"merge_ratio": "half"}, r"case\.json cannot be followed\. merge ratio is 'half'"),
        ({"adaptive": "yes"}, "adaptive is 'yes', expected true or false"),
        ({"kv_cache": 0}, "kv_cache is 0, expected true or false"),
        ({"gen_length": "16"}, "tokens is"),
        ({"gen_length": [16]}, "tokens is"),
        ({"block_length": 1.5}, "block_length is 1.5, expected an integer"),
        ({"remasking": ["low_confidence"]}, "remasking is"),
        ({"schedule": {"shift": 3}}, "step schedule is"),
        ({"temperature": None}, "temperature is None"),
        ({"name": ["a"]}, "name is"),
    ],
)
def test_a_recording_that_contradicts_its_case_is_refused(tmp_path: Path, changes: dict, says: str) -> None:
    folder = _with_case(OWN_GOLDEN / "plain-adaptive", tmp_path / "case", **changes)
    with pytest.raises(D3tomError, match=says):
        load_recorded_run(folder)


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("transfer", np.zeros((8, 16), np.float32), "transfer of F32"),
        ("tokens", np.zeros((8, 16), np.float32), "tokens of F32"),
        ("logits", np.zeros((8, 16, 4), np.int64), "logits of I64"),
        ("tokens", np.zeros((0, 16), np.int64), "there is no step"),
        ("merge.0.keep", np.zeros((2, 3), np.bool_), r"merge\.0\.keep of bool \[2, 3\]"),
        ("merge.0.keep", np.zeros(3, np.bool_), r"merge\.0\.keep of bool \[3\]"),
        ("merge.99.keep", np.zeros(99, np.bool_), "without a gap"),
        ("anything", np.zeros(3, np.uint64), "anything of U64"),
    ],
)
def test_a_trace_of_other_kinds_is_refused(tmp_path: Path, name: str, array: np.ndarray, says: str) -> None:
    from safetensors.numpy import load_file, save_file

    folder = _with_case(OWN_GOLDEN / "plain-adaptive", tmp_path / "case")
    trace = load_file(folder / "trace.safetensors") | {name: array}
    if name == "tokens" and not len(array):
        trace |= {other: trace[other][:0] for other in ("logits", "transfer")}
    save_file(trace, folder / "trace.safetensors")
    with pytest.raises(D3tomError, match=says):
        load_recorded_run(folder)


@pytest.mark.parametrize("name", ["case.json", "trace.safetensors"])
def test_a_recording_is_of_regular_files(tmp_path: Path, name: str) -> None:
    import os

    folder = _with_case(OWN_GOLDEN / "plain-adaptive", tmp_path / "case")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(D3tomError, match="a named pipe"):
        load_recorded_run(folder)
