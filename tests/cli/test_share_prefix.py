"""--share-prefix on the commands: what is built, run, proven and shown, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.cpu.place import tuned_file
from d3tom_export.engines.stages import engine_stages
from d3tom_export.export.weights import demand_of
from tests.conftest import Invoke


def test_a_build_that_shares_has_one_stage_more(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ("--layer", 1, "--ratio", 0.7, "--kv-cache", "--share-prefix")
    result = invoke("build", "--model", checkpoint_folder, *settings)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "synthetic-d3tom-l1-r0.7-cached-shared"
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert manifest["shares_prefix"] is True
    assert list(manifest["stages"])[2:4] == ["prefill", "extend"]
    assert tuned_file("fp32", "extend") in manifest["files"]
    assert manifest["validation"]["passed"]
    shown = invoke("inspect", folder)
    assert "questions can share a picture's prefill (--share-prefix)" in shown.stdout
    assert "extend.onnx" in shown.stdout


@pytest.mark.parametrize("arguments", [[], ["--no-kv-cache"]])
def test_a_build_without_a_cache_refuses_it_before_it_begins(
    checkpoint_folder: Path, tmp_path: Path, arguments: list[Any], invoke: Invoke
) -> None:
    settings = ("--layer", 1, "--share-prefix", "--output", tmp_path / "bundle")
    result = invoke("build", "--model", checkpoint_folder, *settings, *arguments)
    assert result.exit_code == 2, result.output
    assert "--share-prefix concerns the loop with a KV cache" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("merge_at", ["step", "prefill"])
def test_questions_of_a_run_share_what_the_oracle_does(
    sharing_bundle: Bundle, sharing_prefill_bundle: Bundle, merge_at: str, image: Path, invoke: Invoke
) -> None:
    folder = (sharing_bundle if merge_at == "step" else sharing_prefill_bundle).folder

    def run(*arguments: object) -> list[dict[str, Any]]:
        asked = ("run", folder, "--image", image, "--prompt", "What is it?", "--prompt", "Where?", "--kv-cache")
        result = invoke(*asked, "--json", "-", *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["answers"]

    shared, plain = run("--share-prefix"), run()
    by_oracle = run("--share-prefix", "--backend", "pytorch")
    assert [answer["token_ids"] for answer in shared] == [answer["token_ids"] for answer in by_oracle]
    assert len({answer["shared_tokens"] for answer in shared}) == 1
    for answer in shared:
        assert answer["visual_tokens"] < answer["shared_tokens"] < answer["prompt_tokens"]
    assert [answer["shared_tokens"] for answer in plain] == [0, 0]
    assert [answer["token_ids"] for answer in shared] != [answer["token_ids"] for answer in plain]
    # A question without a picture has nothing to share, and says so.
    alone = invoke("run", folder, "--prompt", "What?", "--kv-cache", "--share-prefix", "--json", "-")
    assert json.loads(alone.stdout)["shared_tokens"] == 0


def test_validate_proves_whole_answers_and_the_stage_by_itself(
    sharing_prefill_bundle: Bundle, tmp_path: Path, invoke: Invoke
) -> None:
    folder = sharing_prefill_bundle.folder
    call = ("validate", folder, "--kv-cache", "--samples", 1, "--share-prefix")
    result = invoke(*call, "--graphs", "tuned", "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("PASSED: onnxruntime, prefixes shared, 1 answers")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["passed"], report["share_prefix"]) == (True, True)
    stages = invoke("validate", folder, "--kv-cache", "--first-bad-stage", "--json", "-")
    told = json.loads(stages.stdout)
    assert told["passed"]
    calls = {stage["stage"]: stage["calls"] for stage in told["stages"]}
    assert calls["extend"] == 2  # merged at the prefill, and not


def test_graphs_in_other_precisions_share_too(
    sharing_bundle: Bundle, image: Path, tmp_path: Path, invoke: Invoke
) -> None:
    folder = shutil.copytree(sharing_bundle.folder, tmp_path / "copy")
    for precision in ("fp16", "int8"):
        added = invoke("build", "--bundle", folder, "--precision", precision)
        assert added.exit_code == 0, added.output
        asked = ("--kv-cache", "--share-prefix", "--precision", precision)
        ran = invoke("run", folder, "--image", image, "--prompt", "What?", "--prompt", "Where?", *asked, "--json", "-")
        assert ran.exit_code == 0, ran.output
        assert all(answer["shared_tokens"] for answer in json.loads(ran.stdout)["answers"])
    proven = invoke("validate", folder, "--samples", 1, *asked[:2], "--precision", "fp16")
    assert proven.exit_code == 0, proven.output
    assert "against PyTorch in fp16, prefixes shared" in proven.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", "--prompt", "What?"], 2, "add --kv-cache"),
        (["run", "--prompt", "What?", "--no-kv-cache"], 2, "leave --no-kv-cache out"),
        (["run", "--prompt", "What?", "--kv-cache", "--backend", "tensorrt"], 2, "engines of tensorrt do not share"),
        (["validate", "--backend", "tensorrt-rtx"], 2, "engines of tensorrt-rtx do not share"),
        (["validate", "--no-kv-cache"], 2, "leave --no-kv-cache out"),
        (["validate", "--layers"], 2, "leave the option out"),
    ],
)
def test_what_could_not_share_is_refused(
    sharing_bundle: Bundle, arguments: list[str], code: int, says: str, invoke: Invoke
) -> None:
    command, *rest = arguments
    result = invoke(command, sharing_bundle.folder, *rest, "--share-prefix")
    assert result.exit_code == code, result.output
    assert says in " ".join(result.stderr.split())


@pytest.mark.parametrize("backend", ["onnxruntime", "pytorch"])
def test_a_bundle_built_without_the_stage_says_how_to_get_it(bundle: Bundle, backend: str, invoke: Invoke) -> None:
    for command in (("run", bundle.folder, "--prompt", "What?"), ("validate", bundle.folder)):
        result = invoke(*command, "--kv-cache", "--share-prefix", "--backend", backend)
        assert result.exit_code == 1, result.output
        assert "Build it anew with --kv-cache and --share-prefix" in result.stderr
    case = invoke("validate", "--case", bundle.folder, "--share-prefix")
    assert (case.exit_code, "--share-prefix cannot change" in case.stderr) == (2, True)


def test_engines_leave_the_stage_out_and_memory_counts_it(
    sharing_bundle: Bundle, bundle: Bundle, checkpoint_folder: Path
) -> None:
    made = [engine_stages(each.manifest.stages, each.config, each.manifest.merge) for each in (sharing_bundle, bundle)]
    assert made[0] == made[1]
    assert set(sharing_bundle.manifest.stages) - set(bundle.manifest.stages) == {"extend"}
    checkpoint = open_checkpoint(checkpoint_folder)
    plain, sharing = (demand_of(checkpoint, "link", ["cached"], shares_prefix=shares) for shares in (False, True))
    assert sharing.runtime - plain.runtime == plain.standard  # all blocks once more
    uncached = (demand_of(checkpoint, "link", ["uncached"], shares_prefix=shares) for shares in (False, True))
    assert len(set(uncached)) == 1
