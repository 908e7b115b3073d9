"""``evaluate``: a bundle's graphs, a checkpoint, what each may vary, and a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.cli import common
from d3tom_export.cli.grid_options import Several, loops_from
from d3tom_export.config import Loop
from d3tom_export.errors import D3tomError
from tests.conftest import Invoke


def _rows(invoke: Invoke, *arguments: object) -> list[dict[str, Any]]:
    result = invoke("evaluate", *arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"]


def _untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "answer_seconds": None} for row in rows]


def test_a_bundles_graphs(bundle: Bundle, questions: Path, invoke: Invoke, tmp_path: Path) -> None:
    arguments = [bundle.folder, "--data", questions, "--no-normalize", "--ratio", "0,0.5", "--loop", "cached,uncached"]
    result = invoke("evaluate", *arguments, "--json", tmp_path / "result.json")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "result.json").read_text())
    rows = record["rows"]
    assert [row["setting"] for row in rows] == [
        "uncached: unmerged",
        "uncached: l* 1, ratio 0.5 adaptive, decider",
        "cached: unmerged",
        "cached: l* 1, ratio 0.5 fixed, decider",
    ]
    assert (record["backend"], record["questions"], record["metric"]) == ("onnxruntime", 6, "exact-match")
    assert rows[0]["exact_match"] == pytest.approx(5 / 6, abs=1e-3)
    for row in rows:
        assert row.keys() >= {"exact_match", "interval", "retention", "mean_kept", "steps", "flops", "answer_seconds"}
        assert row["setting"] in result.stdout
    assert "no difference seen" in result.stdout
    assert "By kind of question" in result.stdout
    assert "what 6 questions cannot show" in result.stdout
    # The oracle on the bundle's weights says the same.
    eager = _rows(invoke, *arguments, "--backend", "pytorch")
    for one, other in zip(rows, eager, strict=True):
        assert {name: one[name] for name in ("exact_match", "mean_kept", "steps", "flops", "kinds")} == {
            name: other[name] for name in ("exact_match", "mean_kept", "steps", "flops", "kinds")
        }


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--layer", "2"], 1, "built for --layer 1 and not 2"),
        (["--layer", "1,2"], 1, "Add --backend pytorch"),
        (["--select", "decider,random"], 1, "--select decider and not random"),
        (["--layer", "99"], 1, "outside this model"),
        (["--loop", "cached", "--kv-cache"], 2, "say the same"),
        (["--loop", "cashed"], 2, "is not one of"),
        (["--merge-at", "prefill"], 2, "add --loop cached"),
        (["--ratio", "0.5,1"], 2, "is not in the range"),
        (["--ratio", ""], 2, "not a valid float"),
        (["--threshold", "0.9"], 2, "--threshold is of --commit threshold"),
        (["--model", "x"], 2, "either a BUNDLE or --model"),
        (["--match", "("], 1, "no regular expression"),
        (["--metric", "bleu"], 2, "is not one of"),
        (["--samples", "7"], 1, "has 6 questions and 7 were asked for"),
        (["--system", "x", "--no-system"], 2, "exclude one another"),
    ],
)
def test_what_a_bundle_refuses(
    bundle: Bundle, questions: Path, invoke: Invoke, arguments: list[str], code: int, says: str
) -> None:
    result = invoke("evaluate", bundle.folder, "--data", questions, *arguments)
    assert result.exit_code == code, result.output
    assert says in " ".join(result.stderr.split())


def test_loops_that_there_are() -> None:
    def chosen(loops: Any = None, kv_cache: bool | None = None) -> tuple[Loop, ...]:
        return loops_from({"loops": loops, "kv_cache": kv_cache}, ("uncached",), ("uncached",))

    assert chosen() == chosen(("uncached",)) == chosen(kv_cache=False) == ("uncached",)
    for asked in ({"loops": ("cached", "uncached")}, {"kv_cache": True}):
        with pytest.raises(D3tomError, match="has no stages for the cached loop"):
            chosen(**asked)


def test_a_checkpoint_runs_any_setting(checkpoint_folder: Path, questions: Path, invoke: Invoke) -> None:
    result = invoke("evaluate", "--model", checkpoint_folder, "--data", questions, "--samples", 2, "--layer", "1,2",
                    "--ratio", "0,0.6", "--select", "decider,uniform", "--loop", "uncached,cached",
                    "--positions", "compact,original", "--commit", "plan,threshold,factor", "--factor", "1,2",
                    "--json", "-")  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert "leaves out what it cannot do" in result.stderr
    assert {row["commit"] for row in rows} == {"plan", "threshold 0.9", "factor 1", "factor 2"}
    assert {(row["layer"], row["select"]) for row in rows if row["loop"] == "uncached"} == {
        (None, None),
        *((layer, select) for layer in (1, 2) for select in ("decider", "uniform")),
    }
    assert {row["select"] for row in rows if row["loop"] == "cached"} == {None, "decider"}
    assert {row["against"] for row in rows if row["schedule"] != "none" and row["commit"] == "plan"} == {
        "uncached: unmerged",
        "cached: unmerged",
    }
    assert all(
        row["against_decider"]["equal_kept"] for row in rows if row["select"] == "uniform" and row["commit"] == "plan"
    )


def test_the_bundled_model_and_its_scenes(tiny_bundle: Bundle, invoke: Invoke, tmp_path: Path) -> None:
    """Few steps of few scenes: what the real model says is judged elsewhere."""
    results = tmp_path / "answers.jsonl"
    few = ["--samples", 2, "--gen-length", 4, "--metric", "anls"]
    rows = _rows(invoke, tiny_bundle.folder, *few, "--ratio", "0.5", "--results", results)
    more = [tiny_bundle.folder, "--samples", 4, "--gen-length", 4, "--ratio", "0,0.5,0.9", "--results", results]
    again = invoke("evaluate", *more, "--json", "-")
    assert again.exit_code == 0, again.output
    assert f"{results} has 4 answers already" in again.stderr
    record = json.loads(again.stdout)
    assert record["answers_before"] == 4
    assert {row["questions"] for row in record["rows"]} == {4}
    assert "anls" in rows[0]
    wording = invoke("evaluate", *more, "--no-system")
    assert wording.exit_code == 1
    assert "how the model is asked (--system)" in wording.stderr


COMMAND = [sys.executable, "-m", "d3tom_export", "evaluate"]


def _answers_in(path: Path) -> int:
    return path.read_bytes().count(b'"text":') if path.exists() else 0


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers(checkpoint_folder: Path, questions: Path, tmp_path: Path) -> None:
    """SIGKILL of the real command, twice; then it ends, and all but the times is as without a kill."""
    arguments = ["--model", str(checkpoint_folder), "--data", str(questions), "--no-normalize", "--layer", "1,2",
                 "--ratio", "0,0.5,0.8", "--select", "decider,random", "--temperature", "0.5"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(results: Path) -> subprocess.Popen[bytes]:
        command = [*COMMAND, *arguments, "--results", str(results), "--json", str(results.with_suffix(".json"))]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert start(whole).wait(timeout=600) == 0
    total = _answers_in(whole)
    assert total == 6 * 9
    for kill in (1, 2):
        process = start(killed)
        deadline = time.monotonic() + 300
        while _answers_in(killed) < kill * total // 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert kill * total // 3 <= _answers_in(killed) < total
    # What a kill in the middle of a write leaves.
    killed.write_bytes(killed.read_bytes()[:-7])
    process = start(killed)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    assert b"answers already" in told
    rows = [json.loads(path.with_suffix(".json").read_text())["rows"] for path in (whole, killed)]
    assert _untimed(rows[0]) == _untimed(rows[1])


def test_lists_of_values() -> None:
    import click

    numbers = Several(click.FloatRange(0, 1))
    assert numbers.convert("0.5, 0.1,0.5", None, None) == (0.5, 0.1)
    assert numbers.get_metavar(None) == "X,..."  # type: ignore[arg-type]
    with pytest.raises(click.BadParameter, match="at most 64 are tried"):
        numbers.convert(",".join(["0"] * 65), None, None)


def test_time_that_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    progress = common.ConsoleProgress()
    now = [0.0]
    monkeypatch.setattr(progress, "seconds", lambda: now[0])
    left = common.TimeLeft(progress)
    for done, seconds in ((10, 0), (11, 2), (20, 20), (21, 22), (60, 100), (110, 200)):
        now[0] = float(seconds)
        left("answering", done, 110)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        "answering (10/110)",
        "answering, 3 min 00 s left (20/110)",  # ten of this run's hundred in twenty seconds
        "answering, 1 min 40 s left (60/110)",
        "answering: done (110/110)",
    ]
    assert common._duration(3725) == "1 h 02 min"
