"""``tune``: what it searches, what it prints, and that the printed command builds what was chosen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.cli import build_command
from d3tom_export.cli.build_words import build_command as build_words
from d3tom_export.cli.build_words import run_command
from d3tom_export.cli.main import main
from d3tom_export.config import CacheMergeConfig, GenerationConfig, Loop, MergeConfig
from d3tom_export.quality.settings import Setting
from tests.conftest import Invoke, picture

ALWAYS = ["--match", "^", "--no-normalize"]
"""With the answer "": whatever is said is right."""


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions that every setting answers right with :data:`ALWAYS`."""
    folder = tmp_path_factory.mktemp("easy")
    picture(60, 40).save(folder / "x.png")
    line = json.dumps({"image": "x.png", "question": "What?", "answer": ""})
    (folder / "x.jsonl").write_text("\n".join([line] * 8))
    return folder


def test_a_floor_on_a_checkpoint(checkpoint_folder: Path, easy: Path, invoke: Invoke, tmp_path: Path) -> None:
    figure, results = tmp_path / "front.svg", tmp_path / "answers.jsonl"
    arguments = ["tune", "--model", checkpoint_folder, "--data", easy, "--min-retention", 0.99, *ALWAYS,
                 "--gen-length", 4, "--layer", "1,2", "--ratio", "0.5,0.9", "--results", results,
                 "--json", tmp_path / "x.json"]  # fmt: skip
    result = invoke(*arguments, "--figure", figure)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["passed"]
    assert record["searched_on"] == record["check"]["questions"] == 4
    assert record["candidates"] > 8
    assert record["rounds"][0]["candidates"] == record["candidates"]
    assert record["rounds"][-1]["questions"] == 4
    tried = record["check"]["tried"]
    assert len(tried) == 1
    assert tried[0]["cost"] == min(each["cost"] for each in record["finalists"])
    assert tried[0]["retention"] == 1.0
    assert tried[0]["lowest_retention"] < 0.99
    assert "keeps the floor" in result.stdout
    assert "cannot tell it from a retention of" in result.stdout
    assert record["command"] in result.stdout
    assert record["command"].startswith(f"d3tom-export build --model {checkpoint_folder} --layer")
    assert "--gen-length 4" in record["command"]
    assert "Pareto front" in figure.read_text()
    # Every answer is there already: the same numbers, but for nothing.
    again = invoke(*arguments)
    assert json.loads((tmp_path / "x.json").read_text()) | {"figure": str(figure)} == record
    assert again.exit_code == 0
    proven = invoke(*arguments, "--proven")
    assert proven.exit_code == 1
    assert "FAILED: none of" in proven.stdout
    assert "not proven" in proven.stdout
    assert "prove a retention of" in proven.stdout
    budget = invoke(*arguments[:5], "--max-flops", 1000, *arguments[7:])
    assert budget.exit_code == 0, budget.output
    assert "within the budget" in budget.stdout
    none = invoke(*arguments[:5], "--max-flops", 1e-6, *arguments[7:])
    assert none.exit_code == 1
    assert "Raise the budget" in none.stdout


def test_what_a_bundle_leaves_open(bundle: Bundle, easy: Path, invoke: Invoke) -> None:
    result = invoke("tune", bundle.folder, "--data", easy, "--samples", 4, "--min-retention", 0.9, *ALWAYS,
                    "--ratio", "0.5,0.9", "--cost", "time", "--json", "-")  # fmt: skip
    record = json.loads(result.stdout)
    settings = [record["reference"], *record["finalists"], *record["left_behind"]]
    assert {each["merge"]["layer"] for each in settings if each["merge"]} == {1}
    assert {each["loop"] for each in settings} == {"uncached", "cached"}
    assert record["cost"] == "time"
    if record["passed"]:
        assert shlex.split(record["command"])[:3] == ["d3tom-export", "run", str(bundle.folder)]
        _parses(record["command"])
    else:
        assert result.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing was given"),
        (["--min-retention", "0.9", "--max-flops", "1"], "--min-retention and --max-flops was given"),
        (["--max-time", "5", "--proven"], "go with --min-retention"),
        (["--max-flops", "5", "--cost", "time"], "go with --min-retention"),
        (["--min-retention", "1.5"], "is not in the range"),
        (["--min-retention", "0.9", "--figure", "x.pdf"], "writes .png and .svg"),
        (["--min-retention", "0.9", "--check-share", "1"], "is not in the range"),
        (["--min-retention", "0.9", "--loop", "uncached", "--ratio", "0"], "nothing to search"),
        (["--min-retention", "0.9", "--loop", "uncached", "--merge-at", "prefill"], "add --loop cached"),
    ],
)
def test_what_is_refused(invoke: Invoke, checkpoint_folder: Path, easy: Path, arguments: list[str], says: str) -> None:
    result = invoke("tune", "--model", checkpoint_folder, "--data", easy, *arguments)
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.stderr.split())


def _parses(command: str, then: Callable[[dict[str, Any]], Any] = dict) -> Any:
    """What ``then`` makes of the options of a command that was printed."""
    program, name, *arguments = shlex.split(command)
    assert program == "d3tom-export"
    with click.Context(main) as parent:
        found = main.get_command(parent, name)
        assert found is not None
        with click.Context(found, parent=parent, info_name=name) as context:
            found.parse_args(context, arguments)
            return then(context.params)


BASE = GenerationConfig(gen_length=8, step_ratio=1.0)
PREFILL = MergeConfig(2, 0.123456789, "fixed", merge_at="prefill", aggregate="mean")
CACHE = CacheMergeConfig(adaptive=True, restore_norm=False, text_targets=False, remerge="per-block")


@pytest.mark.parametrize(
    ("loop", "merge", "generation"),
    [
        ("uncached", MergeConfig(1, 0.9), BASE),
        ("uncached", MergeConfig(0, 0.5, "fixed", "fastv", "mean", "original", deciders="looking"), BASE),
        ("cached", MergeConfig(2, 0.7, cache=CACHE), BASE.changed(commit="threshold", threshold=0.8, max_steps=3)),
        ("cached", PREFILL, BASE.changed(steps=4, gen_length=4, fill_after_end=True, commit="frechet", margin=0.25)),
        ("cached", None, BASE.changed(temperature=0.5, seed=7, schedule="shift", shift=0.5)),
        ("uncached", None, BASE),
    ],
)
def test_the_printed_command_builds_what_was_chosen(
    loop: Loop, merge: MergeConfig | None, generation: GenerationConfig, tmp_path: Path
) -> None:
    setting = Setting.of(loop, merge, generation)
    printed = build_words(setting, 2, BASE, tmp_path / "a model", None)
    request = _parses(printed, build_command._request)
    assert request.stages.loops == (loop,)
    assert request.source.folder == tmp_path / "a model"
    built = Setting.of(loop, request.stages.merge, BASE.changed(**request.generation))
    assert built == replace(setting, generation=built.generation)
    assert built.generation == generation
    assert "--model" not in build_words(setting, 2, BASE, None, None)


def test_the_printed_command_runs_what_was_chosen() -> None:
    setting = Setting.of("cached", MergeConfig(2, 0.7, cache=CACHE, keep_multiple=8), BASE.changed(gen_length=4))
    given = _parses(run_command(setting, Path("a bundle"), BASE, ("uncached", "cached")))
    assert (given["bundle_folder"], given["ratio"], given["kv_cache"]) == (Path("a bundle"), 0.7, True)
    assert (given["schedule"], given["remerge"], given["keep_multiple"]) == ("adaptive", "per-block", 8)
    assert (given["cached_adaptive"], given["gen_length"]) == (True, 4)
    plain = _parses(run_command(setting.unmerged, Path("a bundle"), BASE, ("cached",)))
    assert (plain["schedule"], plain["kv_cache"]) == ("none", None)
