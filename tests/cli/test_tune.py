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

from d3tom_export.api.settings import Settings, resolve
from d3tom_export.bundle.folder import Bundle
from d3tom_export.cli import answer_options, build_command
from d3tom_export.cli.build_words import Given, command_of, run_command
from d3tom_export.cli.build_words import build_command as build_words
from d3tom_export.cli.common import ConsoleProgress
from d3tom_export.cli.grid_options import merges_from
from d3tom_export.cli.main import main
from d3tom_export.cli.quality_source import Source, open_source
from d3tom_export.cli.tune_command import _given
from d3tom_export.cli.tune_report import text
from d3tom_export.config import CacheMergeConfig, GenerationConfig, Loop, MergeConfig
from d3tom_export.pipeline import Reader
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
    timed = invoke(*arguments, "--cost", "time")
    assert "does not say where they were made" in timed.stderr
    assert "All questions are about one picture" in timed.stderr
    budget = invoke(*arguments[:5], "--max-flops", 1000, *arguments[7:])
    assert budget.exit_code == 0, budget.output
    assert "within the budget" in budget.stdout
    unmerged = json.loads((tmp_path / "x.json").read_text())
    assert unmerged["candidates"] == record["candidates"] + 1  # the first loop's, which a floor is measured against
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
    with click.Context(main, **main.context_settings) as parent:  # -h too, which click keeps with the command
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
        ("uncached", None, replace(BASE, step_ratio=None, steps=4)),
        ("uncached", None, replace(BASE, steps=4)),
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


def test_no_limit_is_said_where_a_model_has_one() -> None:
    """``--top-k 0`` over Dream's 50; steps that were given in place of a share, though they are the model's own."""
    dream = replace(BASE, rank_drawn=True, top_k=50, top_p=0.9)
    for base, chosen in (
        (dream, replace(dream, top_k=None)),
        (replace(BASE, steps=4), replace(BASE, steps=4, step_ratio=None)),
    ):
        printed = build_words(Setting.of("uncached", None, chosen), 2, base, None, None)
        assert base.changed(**_parses(printed, build_command._request).generation) == chosen
        printed = run_command(Setting.of("uncached", None, chosen), Path("b"), base, ("uncached",))
        assert base.changed(**_parses(printed, answer_options.given_generation)) == chosen


@pytest.fixture(scope="module")
def source(bundle: Bundle) -> Source:
    return open_source(bundle.folder, None, None, "auto", "auto", {}, "auto", ConsoleProgress())


RUN = ("ratio", "schedule", "deciders", "remerge", "cached_adaptive", "merge_at", "keep_multiple")


@pytest.mark.parametrize(
    ("loop", "merge"),
    [
        ("uncached", MergeConfig(1, 0.9, deciders="looking", keep_multiple=4)),
        ("cached", MergeConfig(1, 0.5, cache=CacheMergeConfig(adaptive=True, remerge="on-change"))),
        ("cached", None),
    ],
)
def test_the_printed_run_is_the_chosen_setting(
    bundle: Bundle, source: Source, loop: Loop, merge: MergeConfig | None
) -> None:
    stops = ("one", "--two")
    runtime = {"backend": "onnxruntime", "device": "cpu", "precision": "fp32"}
    asked = source.asked("Be short.", False, stops, False)
    setting = Setting.of(loop, merge, asked.generation.changed(gen_length=4, commit="threshold", threshold=0.8))
    given = _given("onnxruntime", "cpu", None, "fp32", None, None, "Be short.", False, stops, False)
    printed, notes = command_of(setting, asked, given)
    assert not notes
    found = _parses(printed)
    assert {name: found[name] for name in runtime} == runtime
    assert found["kv_cache"] == (loop == "cached")
    options = {name: found[name] for name in (*Settings.__annotations__, "step_schedule") if name in found}
    told = answer_options.settings_from(
        options, found["system"], found["no_system"], found["stops"], None, found["early_exit"]
    )
    reader = Reader.of_bundle(bundle)
    run = resolve(bundle.manifest, reader, loop, "What?", told)
    assert Setting.of(loop, run.merge, run.generation) == setting
    assert run.reader.prompt == asked.reader.prompt


def test_a_selection_that_run_cannot_take_is_built(bundle: Bundle, source: Source) -> None:
    """Graphs of random and uniform serve each other, and ``run`` takes them as they were built."""
    built = replace(source, merge=MergeConfig(1, 0.7, select="random"))
    uniform = Setting.of("uncached", MergeConfig(1, 0.5, select="uniform", keep_multiple=4), source.generation)
    printed, notes = command_of(
        uniform, built, Given(("--precision", "int8"), ("--no-system",), ("--precision", "int8"))
    )
    request = _parses(printed, build_command._request)
    assert request.source.folder == bundle.folder
    assert request.stages.precisions == ("int8",)
    assert Setting.of("uncached", replace(request.stages.merge, keep_multiple=4), source.generation) == uniform
    assert "takes the selection of" in notes[0]
    assert notes[1].endswith("--precision int8 --no-system --keep-multiple 4")
    random = replace(uniform, merge=MergeConfig(1, 0.5, select="random"))
    assert command_of(random, built, Given())[0].startswith("d3tom-export run ")
    prefill = replace(source, merge=MergeConfig(1, 0.7, merge_at="prefill"))
    spread = Setting.of("cached", MergeConfig(1, 0.5, select="uniform", merge_at="prefill"), source.generation)
    assert command_of(spread, prefill, Given())[0].startswith("d3tom-export build ")


def test_a_bundles_quirks_are_built_again(bundle: Bundle, source: Source) -> None:
    eager = replace(source, checkpoint=(bundle.folder, None))
    setting = Setting.of("uncached", MergeConfig(1, 0.5), source.own_generation)
    assert not {"--full-vocabulary", "--keep-newline"} & set(shlex.split(command_of(setting, eager, Given())[0]))
    language = source.reader.config.language
    config = replace(source.reader.config, language=replace(language, vocab_rows=language.vocab_rows + 1))
    prompt = replace(source.reader.prompt, drop_token_after_image=False)
    quirks = replace(eager, reader=replace(source.reader, config=config, prompt=prompt))
    request = _parses(command_of(setting, quirks, Given())[0], build_command._request)
    assert not request.source.clip_vocabulary
    assert not request.stages.drop_token_after_image


def test_ratios_under_no_schedule_are_refused() -> None:
    names = ("layers", "ratios", "schedules", "selects", "aggregates", "positions", "merge_ats", "deciders")
    options = dict.fromkeys((*names, "remerges", "cached_adaptive", "keep_multiple"))
    base = MergeConfig(1, 0.5, schedule="none")
    with pytest.raises(click.UsageError, match="built with --schedule none"):
        merges_from(base, options | {"ratios": (0.0, 0.5)}, ("uncached",))
    assert merges_from(base, options | {"ratios": (0.0,)}, ("uncached",))
    found = merges_from(base, options | {"ratios": (0.5,), "schedules": ("fixed",)}, ("uncached",))
    assert [merge.schedule for merge in found] == ["fixed"]


def test_of_a_budget_the_next_best_is_tried() -> None:
    row = {"setting": "x", "cost": 2e9, "score": 1.0, "retention": 1.0, "retention_interval": [1, 1], "mean_kept": 1.0}
    row |= {"steps": 2, "on_front": False, "lowest_retention": 0.5, "holds": False}
    check = {"questions": 4, "reference": row, "tried": [row, row | {"holds": True}]}
    result = {
        "model": "m", "backend": "b", "precision": "fp32", "data": "d", "candidates": 2, "searched_on": 4, "seed": 0,
        "rounds": [], "cost": "flops", "reference": row, "finalists": [row], "check": check, "passed": True,
        "min_retention": None, "max_cost": 3e9, "command": "c", "command_notes": ["n"],
    }  # fmt: skip
    assert "over the budget: the next best one is tried" in text(result)
    assert text(result).endswith("c\nn")
    assert "below the floor: the next safer one is tried" in text(result | {"min_retention": 1.1, "max_cost": None})
