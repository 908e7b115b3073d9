"""--merge-at on the commands: what is built, run, proven and shown, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import MANIFEST_FILE
from tests.conftest import Invoke


def test_build_for_the_prefill(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ("--layer", 1, "--ratio", 0.4, "--kv-cache", "--merge-at", "prefill", "--cached-adaptive")
    result = invoke("build", "--model", checkpoint_folder, *settings)
    assert result.exit_code == 0, result.output
    assert "Self-check passed: 4 answers" in result.stdout
    assert "--schedule fixed" not in result.stdout  # the ratio is fixed at the prefill, whatever is asked
    folder = tmp_path / "synthetic-d3tom-l1-r0.4-cached-prefill"
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert manifest["merge"]["merge_at"] == "prefill"
    assert list(manifest["stages"])[2:5] == ["prompt_front", "prompt_merge", "prompt_back"]
    shown = invoke("inspect", folder, "--visual-tokens", 100)
    assert "merged once, at the prompt's prefill, fixed ratio" in shown.stdout
    assert "kept       60 60 60" in shown.stdout  # from the first step on
    assert "prompt_merge.onnx" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "--merge-at prefill concerns the loop with a KV cache"),
        (["--no-kv-cache"], 2, "--merge-at prefill concerns the loop with a KV cache"),
        (["--kv-cache", "--select", "fastv"], 1, "with select decider or uniform"),
        (["--kv-cache", "both", "--positions", "original"], 1, "with select decider or uniform"),
        (["--kv-cache", "--layer", 3], 1, "--layer takes 0 to 2"),
    ],
)
def test_what_a_build_refuses_before_it_begins(
    checkpoint_folder: Path, tmp_path: Path, arguments: list[Any], code: int, says: str, invoke: Invoke
) -> None:
    output = tmp_path / "bundle"
    settings = ("--layer", 1, "--merge-at", "prefill", "--output", output)
    result = invoke("build", "--model", checkpoint_folder, *settings, *arguments)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_merges_where_the_bundle_does_or_at_its_steps(
    prefill_bundle: Bundle, bundle: Bundle, image: Path, invoke: Invoke
) -> None:
    def run(folder: Path, *arguments: object) -> dict[str, Any]:
        asked = ("run", folder, "--image", image, "--prompt", "What?", "--kv-cache", "--json", "-", *arguments)
        result = invoke(*asked)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    merged = run(prefill_bundle.folder)
    visual = merged["visual_tokens"]
    assert merged["merge"]["merge_at"] == "prefill"
    assert set(merged["kept_per_step"]) == {int(visual * 0.3)}
    assert run(prefill_bundle.folder, "--backend", "pytorch")["token_ids"] == merged["token_ids"]
    assert run(prefill_bundle.folder, "--merge-at", "prefill")["token_ids"] == merged["token_ids"]
    at_steps = run(prefill_bundle.folder, "--merge-at", "step")
    assert at_steps["kept_per_step"][0] == visual
    assert at_steps["token_ids"] == run(bundle.folder)["token_ids"]
    for backend in ("onnxruntime", "pytorch"):
        asked = ("run", bundle.folder, "--prompt", "What?", "--kv-cache", "--merge-at", "prefill")
        refused = invoke(*asked, "--backend", backend)
        assert refused.exit_code == 1
        assert "it was built with --merge-at step" in refused.stderr


def test_validate_proves_every_precision_and_both_ways(prefill_bundle: Bundle, tmp_path: Path, invoke: Invoke) -> None:
    both = invoke("validate", prefill_bundle.folder, "--samples", 1, "--graphs", "tuned", "--json", "-")
    report = json.loads(both.stdout)
    assert (report["passed"], report["samples"], report["problems"]) == (True, 2, [])
    at_steps = invoke(
        "validate", prefill_bundle.folder, "--kv-cache", "--samples", 1, "--graphs", "tuned", "--merge-at", "step"
    )
    assert at_steps.exit_code == 0, at_steps.output
    stages = invoke("validate", prefill_bundle.folder, "--kv-cache", "--first-bad-stage", "--json", "-")
    told = json.loads(stages.stdout)
    assert told["passed"]
    calls = {stage["stage"]: stage["calls"] for stage in told["stages"]}
    assert calls["prompt_merge"] == 2  # of both ways
    assert min(calls.values()) >= 1

    folder = shutil.copytree(prefill_bundle.folder, tmp_path / "copy")
    for precision in ("fp16", "int8"):
        added = invoke("build", "--bundle", folder, "--precision", precision)
        assert added.exit_code == 0, added.output
        ran = invoke("run", folder, "--kv-cache", "--prompt", "What?", "--precision", precision, "--json", "-")
        assert ran.exit_code == 0, ran.output


def test_bench_and_flops_count_the_prefill(prefill_bundle: Bundle, tmp_path: Path, invoke: Invoke) -> None:
    made_up = ("--visual-tokens", 60, "--text-tokens", 20, "--no-memory", "--rounds", 1)
    result = invoke("bench", prefill_bundle.folder, *made_up, "--json", tmp_path / "bench.json")
    assert result.exit_code == 0, result.output
    rows = {row["combination"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    at_prefill = "cached + D3ToM at prefill"
    assert {"cached + D3ToM", at_prefill, f"{at_prefill}, threshold"} <= set(rows)  # both ways of one bundle
    assert rows[at_prefill]["cache_bytes"]["full"] == rows["cached"]["cache_bytes"]["full"] // 2
    assert rows["cached + D3ToM"]["cache_bytes"]["full"] == rows["cached"]["cache_bytes"]["full"]
    counted = invoke("flops", "--bundle", prefill_bundle.folder, *made_up[:4], "--json", "-")
    assert counted.exit_code == 0, counted.output
    answers = {row["combination"]: row for row in json.loads(counted.stdout)["answers"]}
    for label in ("cached + D3ToM", at_prefill):
        assert answers[label]["flops"] == rows[label]["flops"]
    assert [stage["stage"] for stage in answers[at_prefill]["stages"]][:3] == [
        "prompt_front",
        "prompt_merge",
        "prompt_back",
    ]
    assert answers["cached"]["stages"][0]["stage"] == "prefill"
    shown = invoke("flops", "--kv-cache")
    assert "visual tokens kept from the first step on" in shown.stdout
