"""`flops` as users call it: tables, JSON, the picture, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import default_generation
from d3tom_export.checkpoint.geometry import geometry_config
from d3tom_export.cli import flops_report
from d3tom_export.cli.main import main
from d3tom_export.cost.flop_figure import draw_reductions
from d3tom_export.cost.flops import Workload, uncached_step
from tests.conftest import OWN_GOLDEN

Invoke = Callable[..., Result]
TINY = ("--geometry", "lavida-tiny", "--layer", 2, "--ratio", 0.9)
LANGUAGE = geometry_config("lavida-tiny").language
ANSWER = default_generation(geometry_config("lavida-tiny"), bundled_model()).gen_length


@pytest.fixture
def invoke() -> Invoke:
    def call(*arguments: object) -> Result:
        return CliRunner().invoke(main, ["flops", *map(str, arguments)])

    return call


def record(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def paragraph(result: Result) -> str:
    assert "Traceback" not in result.output
    message = result.stderr[result.stderr.index("Error: ") :].strip()
    assert "\n" not in message
    return message


def test_without_options_it_is_lavida_8b_as_released(invoke: Invoke) -> None:
    result = invoke()
    assert result.exit_code == 0, result.output
    for line in (
        "lavida-8b, bf16: 32 layers, width 4096",
        "1083 prompt tokens (1008 visual), 64 answer tokens in 32 steps (shift); l* = 3, ratio 0.8 adaptive",
        f"{'uncached':36}   523.1 T       100.0%       -",
        f"{'uncached + D3ToM':36}   203.0 T        38.8%   61.2%",
        "uncached + D3ToM: 12 to 390 of 1008 visual tokens kept",
        "prompt, 5 views",
        "  vision                   3.366 T",
        "   3   38.4%   46.1%   53.7%   61.2%   68.6%   72.3%",
    ):
        assert line in result.stdout


def test_json_holds_what_the_tables_are_made_of(invoke: Invoke) -> None:
    shown = record(invoke(*TINY, "--json", "-", "--steps"))
    assert [row["combination"] for row in shown["answers"]] == [
        "uncached",
        "uncached + D3ToM",
        "cached",
        "cached + D3ToM",
        "cached + D3ToM at prefill",
        "uncached, threshold",
        "uncached + D3ToM, threshold",
        "cached, threshold",
        "cached + D3ToM, threshold",
        "cached + D3ToM at prefill, threshold",
    ]
    assert [row["steps_run"] for row in shown["answers"]] == [16] * 5 + [5] * 5
    work = Workload(shown["prompt_tokens"], shown["visual_tokens"], shown["answer_tokens"], bytes_per_element=2)
    language = geometry_config("lavida-tiny").language
    for row in shown["answers"]:
        for part in ("flops", "bytes"):
            assert row[part] == sum(stage[part] for stage in row["stages"])
        assert row["flops_per_byte"] == pytest.approx(row["flops"] / row["bytes"], abs=1e-3)
        assert ("steps" in row) == row["merged"]
    plain, merged = shown["answers"][:2]
    assert plain["flops"] == 16 * uncached_step(language, work, 2, None).flops
    assert merged["flops"] == sum(step["flops"] for step in merged["steps"])
    assert merged["steps"][0]["keep"] is None
    assert merged["saved"] == 1 - merged["flops"] / plain["flops"]
    table = shown["reductions"]
    assert table["saved"][2][table["ratios"].index(0.9)] == merged["saved"]
    assert len(table["saved"]) == language.n_layers


def test_few_steps_and_a_merged_prefill_at_8b(invoke: Invoke) -> None:
    arguments = ["--layer", 2, "--ratio", 0.9, "--commit", "factor", "--rule-steps", 5, "--json", "-"]
    shown = record(invoke(*arguments))
    rows = {row["combination"]: row for row in shown["answers"]}
    best = rows["cached + D3ToM at prefill, factor"]
    assert best["flops"] + sum(stage["flops"] for stage in shown["prompt"]) < 16e12  # pictures and all
    assert best["flops"] == min(row["flops"] for row in rows.values())
    assert best["saved"] == 1 - best["flops"] / rows["cached, factor"]["flops"]
    assert shown["rules"] == {"factor": 5}
    assert [stage["stage"] for stage in best["stages"]][:3] == ["prompt_front", "prompt_merge", "prompt_back"]
    blocks = record(invoke(*arguments, "--block-length", 16))
    assert blocks["rules"] == {"factor": 4}  # one a block, of 64 tokens
    assert {row["commit"] for row in record(invoke(*TINY, "--commit", "plan", "--json", "-"))["answers"]} == {"plan"}


def test_the_table_of_reductions_has_the_answers_own_at_every_layer(invoke: Invoke) -> None:
    for layer in (0, geometry_config("lavida-tiny").language.n_layers - 1):
        shown = record(invoke(*TINY, "--json", "-", "--layer", layer, "--no-kv-cache"))
        (merged,) = (row for row in shown["answers"] if row["merged"] and row["commit"] == "plan")
        table = shown["reductions"]
        assert table["saved"][layer][table["ratios"].index(0.9)] == merged["saved"]
        assert merged["of_uncached"] == pytest.approx(1 - merged["saved"])


def test_json_leaves_the_tables_to_standard_error(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke(*TINY, "--json", "-")
    assert "one answer" in result.stderr
    path = tmp_path / "flops.json"
    result = invoke(*TINY, "--json", path)
    assert "one answer" in result.stdout
    assert json.loads(path.read_text())["model"] == "lavida-tiny"


def test_a_loop_alone_and_its_steps(invoke: Invoke) -> None:
    result = invoke(*TINY, "--kv-cache", "--remerge", "per-block", "--steps", "--block-length", ANSWER // 2)
    assert result.exit_code == 0, result.output
    assert "uncached + D3ToM" not in result.stdout
    assert "FLOPs saved without a cache" not in result.stdout
    assert "cached + D3ToM, steps" in result.stdout
    assert "cache merged per-block" in result.stdout
    shown = record(invoke(*TINY, "--kv-cache", "--remerge", "per-block", "--block-length", ANSWER // 2, "--json", "-"))
    stages = {stage["stage"]: stage["calls"] for stage in shown["answers"][1]["stages"]}
    assert (stages["decide"], stages["merge"]) == (14, 2)  # one merge a block, none at the first step


def test_a_checkpoint_gives_its_sizes(invoke: Invoke, checkpoint_folder: Path) -> None:
    shown = record(invoke("--model", checkpoint_folder, "--visual-tokens", 100, "--json", "-"))
    assert (shown["layers"], shown["answer_tokens"], shown["precision"]) == (4, 8, "bf16")
    assert shown["vocabulary"] == 262  # clipped to the tokenizer
    assert (shown["merge"]["layer"], shown["merge"]["ratio"]) == (3, 0.8)


def test_nothing_merges_without_visual_tokens(invoke: Invoke) -> None:
    for arguments in (["--visual-tokens", 0], ["--schedule", "none"]):
        shown = record(invoke(*TINY, *arguments, "--json", "-"))
        assert [row["merged"] for row in shown["answers"]] == [False] * 4
        assert "reductions" not in shown
    result = invoke(*TINY, "--visual-tokens", 0)
    assert "nothing merges" in result.stdout
    assert "prompt, 0 views" in result.stdout
    single = invoke(*TINY, "--gen-length", 1, "--step-ratio", 1)  # one step, which never merges
    assert single.exit_code == 0, single.output


def test_a_language_only_model_has_no_views(invoke: Invoke) -> None:
    folder = OWN_GOLDEN / "plain-adaptive"
    shown = record(invoke("--model", folder, "--layer", 2, "--visual-tokens", 20, "--text-tokens", 8, "--json", "-"))
    assert [stage["stage"] for stage in shown["prompt"]] == ["embed"]
    assert shown["answers"][1]["saved"] > 0
    refused = invoke("--model", folder, "--layer", 2, "--text-tokens", 8, "--views", 1)
    assert refused.exit_code == 1
    assert "no vision tower" in paragraph(refused)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture_is_one_and_always_the_same(invoke: Invoke, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    first, second = tmp_path / f"first.{ending}", tmp_path / f"second.{ending}"
    for path in (first, second):
        result = invoke(*TINY, "--figure", path)
        assert result.exit_code == 0, result.output
        assert f"picture: {path}" in result.stdout
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]
    if ending == "svg":
        assert "merge layer" in first.read_text()
        visual = record(invoke(*TINY, "--json", "-"))["visual_tokens"]
        assert f"lavida-tiny: V = {visual}" in first.read_text()
    else:
        with Image.open(first) as picture:
            assert picture.width >= 600
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_the_picture_without_matplotlib_names_the_extra(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke(*TINY, "--figure", tmp_path / "picture.png")
    assert result.exit_code == 1
    assert 'pip install "d3tom-export[plots]"' in paragraph(result)
    assert invoke(*TINY).exit_code == 0
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written(invoke: Invoke, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    result = invoke(*TINY, "--figure", tmp_path / "absent" / "picture.png")
    assert result.exit_code == 1
    assert "cannot be written" in paragraph(result)


def test_the_mark_may_lie_on_either_side(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    for layer in (0, 3):
        path = tmp_path / f"{layer}.png"
        draw_reductions(path, "title", [0, 1, 2, 3], [0.5, 0.9], [[0.4, 0.8]] * 4, (layer, 0.5, 0.4))
        assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (
            ["--layer", LANGUAGE.n_layers],
            1,
            f"merge layer {LANGUAGE.n_layers} is outside this model: it has {LANGUAGE.n_layers} layers",
        ),
        (["--layer", -1], 2, "Invalid value for '--layer'"),
        (
            ["--visual-tokens", 4000],
            1,
            f"75 text, 4000 visual and {ANSWER} answer tokens exceed this model's limit of "
            f"{LANGUAGE.max_sequence_length}",
        ),
        (["--visual-tokens", -1], 2, "Invalid value for '--visual-tokens'"),
        (["--batch", 0], 2, "Invalid value for '--batch'"),
        (["--precision", "int8"], 2, "'int8' is not one of"),  # whose bytes are not counted
        (["--ratio", 1], 2, "Invalid value for '--ratio'"),
        (["--gen-length", 10, "--block-length", 3], 1, "block length 3 does not divide"),
        (["--model", "."], 2, "exclude one another"),
        (["--figure", "picture.pdf"], 2, "--figure writes .png and .svg files"),
        (["--visual-tokens", 0, "--figure", "picture.png"], 1, "--figure would show nothing"),
        (["--schedule", "none", "--figure", "picture.png"], 1, "--figure would show nothing"),
    ],
)
def test_refuses_nonsense(invoke: Invoke, arguments: list[object], code: int, says: str) -> None:
    result = invoke("--geometry", "lavida-tiny", *arguments)
    assert result.exit_code == code, result.output
    assert says in paragraph(result)


def test_refuses_folders_that_are_none(invoke: Invoke, tmp_path: Path) -> None:
    for option, says in (("--model", "is not a folder"), ("--bundle", "is not a bundle")):
        result = invoke(option, tmp_path / "absent")
        assert result.exit_code == 1
        assert says in paragraph(result)


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "-"), (1, "1.000"), (999, "999.0"), (999.96, "1.000 k"), (1234567, "1.235 M"), (5.612e14, "561.2 T")],
)
def test_numbers_are_written_to_four_digits(value: float, written: str) -> None:
    assert flops_report._si(value) == written


def test_device_memory_of_each_loop_is_told(invoke: Invoke) -> None:
    result = invoke(*TINY, "--json", "-")
    memory = record(result)["device_memory"]
    assert list(memory) == ["uncached", "cached"]
    assert all(sum(size for name, size in row.items() if name != "total") == row["total"] for row in memory.values())
    shown = invoke("--geometry", "lavida-8b").stdout
    assert "device memory of engines, cached loop: about 17.1" in shown
    assert "device memory of engines, uncached loop: about 15.8" in shown
