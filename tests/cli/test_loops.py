"""The commands on bundles with a KV cache, without, and with both: which loop runs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.cli.main import main
from tests.conftest import OWN_GOLDEN, picture


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    picture(70, 50).save(path)
    return path


def test_build_for_the_cached_loop(checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(
        "build", "--model", checkpoint_folder, "--layer", 3, "--ratio", 0.4, "--kv-cache", "--remerge", "on-change"
    )
    assert result.exit_code == 0, result.output
    assert "Self-check passed: 4 answers" in result.stdout
    assert "--schedule fixed" not in result.stdout  # the ratio is fixed with a cache: 0.4 is what it keeps to
    folder = tmp_path / "synthetic-d3tom-l3-r0.4-cached"
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert manifest["kv_cache"] is True
    assert manifest["merge"]["cache"]["remerge"] == "on-change"
    assert set(manifest["stages"]) == {
        "vision",
        "embed",
        "prefill",
        "rotate",
        "front",
        "decide",
        "merge",
        "back",
        "certainty",
    }
    assert {entry["loop"] for entry in manifest["stages"].values()} == {None, "cached"}
    shown = invoke("inspect", folder, "--visual-tokens", 100)
    assert "cached loop" in shown.stdout
    assert "merged anew on-change" in shown.stdout
    assert "kept       100 60 60" in shown.stdout  # fixed, whatever the schedule
    refused = invoke("run", folder, "--prompt", "What?", "--no-kv-cache")
    assert refused.exit_code == 1
    assert "--kv-cache both" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--kv-cache", "--no-kv-cache"], 2, "exclude one another"),
        (["--kv-cache", "maybe"], 2, "'maybe' is not one of"),
        (["--remerge", "per-block"], 2, "build it with --kv-cache"),
        (["--no-kv-cache", "--no-restore-norm"], 2, "build it with --kv-cache"),
        (["--kv-cache", "both", "--select", "fastv"], 1, "run these without the cache"),
        (["--kv-cache", "--positions", "original"], 1, "run these without the cache"),
    ],
)
def test_what_a_cached_build_refuses_before_it_begins(
    checkpoint_folder: Path, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    output = tmp_path / "bundle"
    result = invoke("build", "--model", checkpoint_folder, "--layer", 1, "--output", output, *arguments)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert not list(tmp_path.iterdir())


def test_run_takes_either_loop_of_a_bundle_for_both(bundle: Bundle, image: Path) -> None:
    def run(*arguments: object) -> dict[str, Any]:
        result = invoke("run", bundle.folder, "--image", image, "--prompt", "What?", "--json", "-", *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert run()["kv_cache"] is False
    cached = run("--kv-cache")
    assert cached["kv_cache"] is True
    assert len(set(cached["kept_per_step"][1:])) == 1
    assert cached["token_ids"] == run("--kv-cache", "--backend", "pytorch")["token_ids"]
    assert cached["token_ids"] == run("--kv-cache", "--remerge", "on-change")["token_ids"]
    adaptive = run("--kv-cache", "--cached-adaptive")["kept_per_step"]
    assert adaptive[1:] == sorted(adaptive[1:])
    assert len(set(adaptive)) > 2


def test_validate_proves_every_loop_of_a_bundle(bundle: Bundle) -> None:
    both = invoke("validate", bundle.folder, "--samples", 2, "--graphs", "tuned")
    assert both.exit_code == 0, both.output
    assert both.stdout.startswith("PASSED: onnxruntime, 4 answers, 32 steps")
    assert "not probed   the standard graphs" in both.stdout
    one = invoke("validate", bundle.folder, "--samples", 1, "--kv-cache", "--json", "-")
    report = json.loads(one.stdout)
    assert (report["samples"], report["steps"], report["graphs"]) == (2, 16, ["tuned", "standard"])
    assert "stages one by one [onnxruntime, standard graphs, cached]" in report["probes"]
    standard = invoke("validate", bundle.folder, "--samples", 1, "--kv-cache", "--graphs", "standard")
    assert standard.stdout.startswith("PASSED: onnxruntime, standard graphs, 1 answers, 8 steps")


def test_validate_a_recorded_cached_run_on_onnxruntime() -> None:
    result = invoke("validate", "--case", OWN_GOLDEN / "cached", "--backend", "onnxruntime", "--json", "-")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["passed"], report["backend"]) == (True, "onnxruntime")
    assert invoke("validate", "--case", OWN_GOLDEN / "cached", "--kv-cache").exit_code == 2


def test_bench_shows_every_combination_of_a_bundle(bundle: Bundle, tmp_path: Path) -> None:
    result = invoke("bench", bundle.folder, "--rounds", 2, "--json", tmp_path / "bench.json")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["combination"]: row for row in record["rows"]}
    planned = ["uncached", "uncached + D3ToM", "cached", "cached + D3ToM"]
    assert list(rows) == [*planned, *(f"{label}, threshold" for label in planned)]
    assert record["rules"]["threshold"]["threshold"] == 0.9
    for label, row in rows.items():
        assert label in result.stdout
        time = row["answer_seconds"]
        assert 0 < time["min"] <= time["median"] <= time["max"]
        assert 0 < row["first_token_seconds"]["median"] < time["max"]
        assert row["tokens_per_second"] == pytest.approx(8 / time["median"], rel=1e-2)
        assert row["of_flop_ideal"] == pytest.approx(row["speedup"]["median"] / row["flop_ideal_speedup"], rel=1e-2)
        peak = row["peak_bytes"]
        assert peak["added"] == max(peak["first"], peak["later"]) - peak["loaded"]
        assert peak["first"] > peak["loaded"] > 1e7
    assert rows["uncached"]["speedup"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert rows["uncached"]["flops"] > rows["uncached + D3ToM"]["flops"] > rows["cached"]["flops"]
    plain, merged = rows["cached"]["cache_bytes"], rows["cached + D3ToM"]["cache_bytes"]
    assert plain["full"] == merged["full"] == record["prompt_tokens"] * 4 * 2 * 16 * 4  # layers, K and V, width, bytes
    assert (plain["merged"], plain["written_per_step"]) == (0, 0)
    assert 0 < merged["written_per_step"] == merged["merged"] < merged["full"]


def test_bench_counts_right_answers_and_draws_them(tiny_bundle: Bundle, tmp_path: Path) -> None:
    figure = tmp_path / "front.svg"
    result = invoke("bench", tiny_bundle.folder, "--samples", 2, "--commit", "factor", "--factor", 0.5, "--early-exit",
                    "--no-memory", "--figure", figure, "--json", tmp_path / "bench.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["combination"]: row for row in record["rows"]}
    assert {row["questions"] for row in rows.values()} == {2}
    assert rows["uncached"]["exact_match"] == 1.0
    for label in ("uncached", "cached"):
        fast, slow = rows[f"{label}, factor"], rows[label]
        assert fast["steps"] < slow["steps"] / 3
        assert fast["flops"] < slow["flops"]
        low, high = fast["interval"]
        assert low < fast["exact_match"] <= high
    drawn = figure.read_text()
    assert "Pareto front" in drawn
    assert ", factor, " in drawn  # the fastest is always on it
    for arguments, says in (
        (["--figure", tmp_path / "front.pdf", "--samples", 2], "writes .png and .svg"),
        (["--figure", figure], "--samples N"),
        (["--samples", 2, "--visual-tokens", 9], "no right answer"),
    ):
        refused = invoke("bench", tiny_bundle.folder, *arguments)
        assert (refused.exit_code, says in refused.stderr.replace("\n", " ")) == (2, True), refused.stderr


def test_bench_leaves_rules_out_where_only_the_plan_is_asked_for(bundle: Bundle) -> None:
    result = invoke("bench", bundle.folder, "--rounds", 1, "--commit", "plan", "--no-memory", "--json", "-")
    assert result.exit_code == 0, result.output
    assert {row["commit"] for row in json.loads(result.stdout)["rows"]} == {"plan"}
    assert "max_steps" in invoke("bench", bundle.folder, "--commit", "plan", "--max-steps", 2).stderr


def test_bench_on_made_up_sizes_in_a_batch(bundle: Bundle) -> None:
    sizes = ["--visual-tokens", 40, "--text-tokens", 9, "--batch", 2, "--gen-length", 4]
    result = invoke(
        "bench", bundle.folder, "--rounds", 1, "--no-memory", *sizes, "--remerge", "per-block", "--json", "-"
    )
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["prompt"], record["prompt_tokens"], record["batch"]) == ("random embeddings", 49, 2)
    assert all(row["peak_bytes"] is None for row in record["rows"])
    assert record["rows"][3]["cache_bytes"]["written_per_step"] == 0
    too_long = invoke("bench", bundle.folder, "--visual-tokens", 5000)
    assert too_long.exit_code == 1
    assert "limit of 640" in too_long.stderr
    blind = invoke("bench", bundle.folder, "--visual-tokens", 30, "--no-system")
    assert (blind.exit_code, "has no system text" in blind.stderr) == (2, True)
    unmerged = invoke("bench", bundle.folder, "--schedule", "none")
    assert unmerged.exit_code == 1
    assert "nothing to compare" in unmerged.stderr
