"""Grids of settings: what equals what, and what a bundle's graphs leave open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.config import LOOPS, CacheMergeConfig, GenerationConfig, Loop, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.model.lavida import Lavida
from d3tom_export.pipeline import Reader, run_loop
from d3tom_export.quality.settings import Setting, eager_refusal, graph_refusal, grid
from tests.conftest import picture

PLAN = GenerationConfig(gen_length=8)
THRESHOLD = GenerationConfig(gen_length=8, commit="threshold")
MERGE = MergeConfig(layer=1, ratio=0.7)


def test_a_grid_begins_with_the_unmerged() -> None:
    merges = [replace(MERGE, ratio=ratio) for ratio in (0.5, 0.9)]
    found, left_out = grid(LOOPS, merges, [PLAN, THRESHOLD], eager_refusal)
    assert not left_out
    assert [setting.label for setting in found[:4]] == [
        "uncached: unmerged",
        "uncached: l* 1, ratio 0.5 adaptive, decider",
        "uncached: l* 1, ratio 0.9 adaptive, decider",
        "uncached: unmerged, threshold 0.9",
    ]
    assert len(found) == 12
    assert found[7].label == "cached: l* 1, ratio 0.5 fixed, decider"  # as it holds there
    assert len({setting.id for setting in found}) == 12
    assert found[2].unmerged == found[0]


def test_what_is_the_same_is_run_once() -> None:
    merges = [
        MERGE,
        replace(MERGE, merge_at="prefill"),  # without a cache there is none
        replace(MERGE, cache=CacheMergeConfig(remerge="per-block")),
        replace(MERGE, schedule="none"),
    ]
    assert [setting.merge for setting in grid(("uncached",), merges, [PLAN], eager_refusal)[0]] == [None, MERGE]
    cached = grid(("cached",), [MERGE, replace(MERGE, schedule="fixed")], [PLAN], eager_refusal)[0]
    assert [setting.merge and setting.merge.schedule for setting in cached] == [None, "fixed"]


def test_a_setting_is_known_by_all_it_says() -> None:
    setting = Setting.of("uncached", MERGE, PLAN)
    assert setting.id == Setting.of("uncached", replace(MERGE), replace(PLAN)).id
    for other in (
        Setting.of("cached", MERGE, PLAN),
        Setting.of("uncached", None, PLAN),
        Setting.of("uncached", replace(MERGE, select="fastv"), PLAN),
        Setting.of("uncached", MERGE, replace(PLAN, seed=1)),
    ):
        assert other.id != setting.id
    assert Setting.of("uncached", replace(MERGE, select="fastv"), PLAN).decided == setting
    assert "original positions" in Setting.of("uncached", replace(MERGE, positions="original"), PLAN).label
    prefill = replace(MERGE, merge_at="prefill", aggregate="mean", keep_multiple=8, deciders="looking")
    words = Setting.of("cached", prefill, replace(PLAN, commit="factor", factor=2.0)).label
    assert words == (
        "cached: l* 1, ratio 0.7 fixed, decider, at the prefill, mean, multiples of 8, factor 2"
    )  # deciders do not count there
    assert "deciders that look" in Setting.of("cached", replace(MERGE, deciders="looking"), PLAN).label


@pytest.mark.parametrize(
    ("loop", "merge", "changes"),
    [
        *(
            ("uncached", replace(MERGE, select=select), {"aggregate": "mean", "deciders": "looking"})
            for select in ("random", "uniform", "fastv")
        ),
        *(
            (
                "cached",
                replace(MERGE, merge_at="prefill", select=select),
                {
                    "deciders": "looking",
                    "cache": CacheMergeConfig(
                        adaptive=True, remerge="per-block", restore_norm=False, text_targets=False
                    ),
                },
            )
            for select in ("decider", "uniform")
        ),
        ("cached", replace(MERGE, schedule="fixed"), {"cache": CacheMergeConfig(adaptive=True)}),
    ],
)
def test_what_does_not_count_is_not_run_twice(
    loop: Loop, merge: MergeConfig, changes: dict, eager_model: Lavida, checkpoint_folder: Path
) -> None:
    """The very same logits at every step, so one setting."""
    other = replace(merge, **changes)
    assert Setting.of(loop, merge, PLAN) == Setting.of(loop, other, PLAN)
    reader = Reader.from_folder(checkpoint_folder, open_checkpoint(checkpoint_folder).config)
    plan = replace(PLAN, block_length=4)
    runs = []
    for each in (merge.in_loop(loop == "cached"), other.in_loop(loop == "cached")):
        backend = PyTorchBackend(eager_model, each, kv_cache=loop == "cached")
        prompt = reader.read(backend, "What?", [picture(60, 40)], plan)
        mask = reader.config.language.mask_token_id
        runs.append(list(run_loop(backend, prompt, mask, plan, each)))
    assert any(record.merged for record in runs[0]) or merge.merge_at == "prefill"
    for one, same in zip(*runs, strict=True):
        assert one.keep == same.keep
        np.testing.assert_array_equal(one.tokens, same.tokens)
        np.testing.assert_array_equal(one.result.confidence, same.result.confidence)


def test_what_counts_stays() -> None:
    for loop, change in (
        ("uncached", {"deciders": "looking"}),
        ("uncached", {"aggregate": "mean"}),
        ("uncached", {"keep_multiple": 4}),
        ("cached", {"deciders": "looking"}),
        ("cached", {"cache": CacheMergeConfig(adaptive=True)}),
        ("cached", {"cache": CacheMergeConfig(remerge="on-change")}),
        ("cached", {"merge_at": "prefill"}),
    ):
        assert Setting.of(loop, replace(MERGE, **change), PLAN) != Setting.of(loop, MERGE, PLAN)  # type: ignore[arg-type]


def test_a_loop_leaves_out_what_it_cannot_do() -> None:
    merges = [replace(MERGE, select=select) for select in ("decider", "random", "fastv")]
    found, left_out = grid(LOOPS, merges, [PLAN, THRESHOLD], eager_refusal)
    assert left_out == ["The cached loop leaves out what it cannot do (select random, fastv)."]
    assert sum(setting.loop == "cached" for setting in found) == 4
    with pytest.raises(D3tomError, match="run these without the cache"):
        grid(("cached",), merges, [PLAN], eager_refusal)


@pytest.mark.parametrize(
    ("change", "loop", "says"),
    [
        ({"ratio": 0.2, "schedule": "fixed", "deciders": "looking", "keep_multiple": 4}, "uncached", None),
        ({"layer": 2}, "uncached", "--layer 1 and not 2"),
        ({"select": "random"}, "uncached", "--select decider and not random"),
        ({"positions": "original"}, "uncached", "--positions compact and not original"),
        ({"aggregate": "mean"}, "uncached", "--aggregate sum and not mean"),
        ({"merge_at": "prefill"}, "uncached", None),
        ({"merge_at": "prefill"}, "cached", "--merge-at step and not prefill"),
        ({"select": "uniform"}, "cached", "run these without the cache"),
        ({"cache": CacheMergeConfig(adaptive=True, remerge="per-block")}, "cached", None),
        ({"cache": CacheMergeConfig(restore_norm=False)}, "cached", "--restore-norm True and not False"),
        ({"cache": CacheMergeConfig(text_targets=False)}, "uncached", None),
    ],
)
def test_what_the_graphs_of_a_bundle_fix(change: dict, loop: str, says: str | None) -> None:
    reason = graph_refusal(MERGE)(replace(MERGE, **change), loop)  # type: ignore[arg-type]
    if says is None:
        assert reason is None
    else:
        assert reason is not None
        assert says in reason
        assert "--backend pytorch" in reason or "without the cache" in reason


def test_graphs_that_take_scores_from_outside_serve_both_policies() -> None:
    random = replace(MERGE, select="random")
    assert graph_refusal(random)(replace(MERGE, select="uniform"), "uncached") is None
    assert graph_refusal(random)(MERGE, "uncached") is not None
    assert graph_refusal(random)(replace(MERGE, select="uniform", aggregate="mean"), "uncached") is None  # it drops
    at_prefill = graph_refusal(replace(MERGE, merge_at="prefill"))
    assert at_prefill(replace(MERGE, merge_at="prefill", select="uniform"), "cached") is None
    assert at_prefill(MERGE, "cached") is None
