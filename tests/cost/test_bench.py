"""Benchmark arithmetic: rounds in turns, ratios within a round, and bytes of the cache."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pytest

from d3tom_export.config import LOOPS, CacheMergeConfig, GenerationConfig, MergeConfig
from d3tom_export.cost import bench
from d3tom_export.cost.bench import (
    Answered,
    Question,
    Timing,
    answer_in_turns,
    cache_traffic,
    random_prompt,
    share_interval,
    summarize,
)
from d3tom_export.cost.combinations import Combination, combinations_of
from d3tom_export.cost.flops import WHOLE_PROMPT, Workload, prompt_plan, step_merges
from d3tom_export.cost.pareto_figure import front
from d3tom_export.families.registry import read_config
from d3tom_export.loop.denoise import StepRecord, StepResult
from tests.conftest import raw_config

LANGUAGE = read_config(raw_config()).language  # 4 layers, 2 key/value heads of 8
WORK = Workload(prompt_tokens=30, visual_tokens=20, answer_tokens=4)
FOUR = combinations_of(("uncached", "cached"))


def test_every_round_begins_with_another_answer() -> None:
    order: list[str] = []

    def answer(name: str) -> list[int]:
        order.append(name)
        return [1, 2]

    timings = bench.time_in_turns({name: partial(answer, name) for name in "abcd"}, rounds=4)
    assert [len(runs) for runs in timings.values()] == [4] * 4  # the first round warms up
    rounds = [order[4 * turn : 4 * turn + 4] for turn in range(5)]
    assert all(sorted(turn) == list("abcd") for turn in rounds)
    assert len({turn[0] for turn in rounds[1:]}) == 4


def test_combinations_run_on_their_loop_and_merge_and_commit_as_they_should() -> None:
    runs: list[tuple] = []
    zeros, none = np.zeros((1, 4), dtype=np.int64), np.zeros((1, 4), dtype=np.bool_)

    def loop(backend: str, prompt: Any, generation: GenerationConfig, merge: MergeConfig) -> list[StepRecord]:
        runs.append((backend, merge.schedule, merge.merge_at, generation.commit))
        steps = 4 if generation.planned else 2
        result = StepResult(zeros, zeros.astype(np.float64), None)
        keeps = [
            20 if merge.schedule == "none" or (not step and merge.merge_at == "step") else 5 for step in range(steps)
        ]
        return [
            StepRecord(0, step, keep, keep < 20, zeros, none, np.array([4]), result) for step, keep in enumerate(keeps)
        ]

    merge, plan = MergeConfig(1, 0.5, merge_at="prefill"), GenerationConfig(4)
    rules = {"threshold": plan.changed(commit="threshold")}
    every = combinations_of(LOOPS, at_prefill=True, rules=list(rules))
    questions = [Question(random_prompt(LANGUAGE, 5, 20), lambda record, generation: generation.planned)] * 3
    answerers = {each: partial(loop, "cache" if each.loop == "cached" else "plain") for each in every}
    found = answer_in_turns(answerers, questions, plan, rules, merge, rounds=2)
    assert list(found) == every
    assert {len(answers) for answers in found.values()} == {6}
    once = [
        (backend, schedule, at, commit)
        for commit in ("plan", "threshold")
        for backend, schedule, at in [
            ("plain", "none", "step"),
            ("plain", "adaptive", "step"),
            ("cache", "none", "prefill"),
            ("cache", "fixed", "step"),
            ("cache", "fixed", "prefill"),
        ]
    ]
    assert runs[:10] == once  # the warm-up
    assert sorted(runs) == sorted(once * 7)  # it, and two rounds of three questions
    assert len({runs[10 * turn] for turn in range(1, 7)}) == 5  # another one begins each time
    rows = {row["combination"]: row for row in summarize(found, {}, LANGUAGE, 1)}
    assert rows["cached + D3ToM at prefill"]["mean_kept"] == 0.25
    assert rows["cached + D3ToM, threshold"]["mean_kept"] == (1 + 0.25) / 2
    assert (rows["cached"]["steps"], rows["cached, threshold"]["steps"]) == (4, 2)
    assert (rows["cached"]["exact_match"], rows["cached, threshold"]["exact_match"]) == (1.0, 0.0)
    held, anew = (found[each][0] for each in (every[4], every[3]))
    assert {step.afresh for step in held.steps} == {False}
    assert held.prompt.keep == 10
    assert [step.keep for step in anew.steps] == [None, 5, 5, 5]
    flops = {name: row["flops"] for name, row in rows.items()}
    assert flops["cached + D3ToM at prefill, threshold"] < flops["cached, threshold"] < flops["cached"]


@pytest.mark.parametrize(
    ("right", "count", "expected"),
    [(0, 10, (0.0, 0.278)), (10, 10, (0.722, 1.0)), (5, 10, (0.237, 0.763)), (252, 256, (0.961, 0.994))],
)
def test_intervals_are_wilsons(right: int, count: int, expected: tuple[float, float]) -> None:
    assert share_interval(right, count) == pytest.approx(expected, abs=5e-4)  # as tables of it have them


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1.0, 0.5)], [0]),
        ([(2.0, 0.9), (1.0, 0.5), (3.0, 0.8), (1.5, 0.5), (4.0, 0.95)], [1, 0, 4]),
        ([(1.0, 0.5), (1.0, 0.7), (1.0, 0.7)], [1]),
    ],
)
def test_the_front_is_what_nothing_beats_in_both(points: list[tuple[float, float]], expected: list[int]) -> None:
    assert front(points) == expected


def test_an_answer_is_timed_from_before_it_starts() -> None:
    """Prefill happens when the loop is started, before its first step."""

    def answer() -> list[int]:
        time.sleep(0.02)
        return [1, 2]

    timing = bench.time_answer(answer)
    assert timing.first_token >= 0.02
    assert len(timing.steps) == 1
    assert timing.total == pytest.approx(timing.first_token + sum(timing.steps))


def _answered(timings: list[Timing]) -> list[Answered]:
    steps = tuple(step_merges(MergeConfig(1, 0.5, "none"), GenerationConfig(4), 20))
    return [Answered(timing, WORK, steps, WHOLE_PROMPT, None) for timing in timings]


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that turns three times as slow leaves them alone."""
    plain = [Timing(1.0, (1.0,), 2.0), Timing(3.0, (3.0,), 6.0), Timing(1.0, (1.0,), 2.0)]
    fast = [Timing(0.5, (0.5,), 1.0), Timing(1.5, (1.5,), 3.0), Timing(0.5, (0.5,), 0.8)]
    answers = {FOUR[0]: _answered(plain), FOUR[3]: _answered(fast)}
    rows = summarize(answers, {}, LANGUAGE, 1)
    assert rows[1]["speedup"] == {"median": 2.0, "min": 2.0, "max": 2.5}
    assert rows[1]["tokens_per_second"] == 4.0
    assert rows[1]["answer_seconds"] == {"median": 1.0, "min": 0.8, "max": 3.0}
    assert rows[1]["first_token_seconds"]["median"] == 0.5
    assert rows[1]["of_flop_ideal"] == pytest.approx(2.0 / rows[1]["flop_ideal_speedup"], abs=1e-3)
    assert rows[0]["flop_ideal_speedup"] == 1.0
    assert [row["peak_bytes"] for row in rows] == [None, None]


def test_an_answer_of_one_step_has_no_later_ones() -> None:
    (row,) = summarize({FOUR[0]: _answered([Timing(1.0, (), 1.0)])}, {}, LANGUAGE, 1)
    assert row["step_seconds"]["median"] == 0.0


def _traffic(merge: MergeConfig) -> dict[str, int]:
    generation = GenerationConfig(4)
    last = step_merges(merge, generation, WORK.visual_tokens)[-1]
    return cache_traffic(LANGUAGE, WORK, 1, last, prompt_plan(merge, WORK.visual_tokens))


@pytest.mark.parametrize(
    ("cache", "schedule", "merged", "read", "written"),
    [
        (CacheMergeConfig(), "none", 0, 30 * 4, 0),
        (CacheMergeConfig(), "fixed", 20 * 2, 30 * 4 + 20 * 2, 20 * 2),  # 10 of 20 visual tokens stay; l* = 1
        (CacheMergeConfig(remerge="per-block"), "fixed", 20 * 2, 30 * 2 + 20 * 2, 0),
    ],
)
def test_cache_traffic_counts_rows(
    cache: CacheMergeConfig, schedule: Any, merged: int, read: int, written: int
) -> None:
    """In rows of one layer: keys and values of 2 heads of 8, float32."""
    row = 2 * 2 * 8 * 4
    sizes = _traffic(MergeConfig(1, 0.5, schedule, cache=cache))
    expected = {"full": 30 * 4, "merged": merged, "read_per_step": read, "written_per_step": written}
    assert sizes == {name: rows * row for name, rows in expected.items()}


def test_cache_traffic_of_a_merged_prefill_holds_no_full_cache_behind_the_layer() -> None:
    row, merge = 2 * 2 * 8 * 4, MergeConfig(1, 0.5, "fixed", merge_at="prefill")
    sizes = _traffic(merge.in_loop(True))
    expected = {"full": 30 * 2, "merged": 20 * 2, "read_per_step": 30 * 2 + 20 * 2, "written_per_step": 0}
    assert sizes == {name: rows * row for name, rows in expected.items()}


def test_a_random_prompt_has_the_sizes_asked_for() -> None:
    prompt = random_prompt(LANGUAGE, text_tokens=10, visual_tokens=20, batch=3)
    assert prompt.embeddings.shape == (3, 30, 32)
    assert prompt.embeddings.dtype == np.float32
    np.testing.assert_array_equal(prompt.visual_positions, np.arange(2, 22))


def test_an_unmerged_combination_switches_merging_off() -> None:
    base = MergeConfig(1, 0.5)
    assert Combination("cached", "unmerged").merge(base).schedule == "none"
    assert Combination("cached", "step").merge(base) == base
    assert [combination.label for combination in FOUR] == ["uncached", "uncached + D3ToM", "cached", "cached + D3ToM"]
    assert Combination("cached", "prefill", "factor", by="x").label == "x: cached + D3ToM at prefill, factor"
    held = Combination("cached", "step", remerge="per-block")
    assert held.label == "cached + D3ToM, per-block"
    assert held.merge(base).cache.remerge == "per-block"
