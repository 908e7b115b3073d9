"""Benchmark arithmetic: rounds in turns, ratios within a round, and bytes of the cache."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pytest

from d3tom_export.config import CacheMergeConfig, GenerationConfig, MergeConfig
from d3tom_export.cost import bench
from d3tom_export.cost.bench import Combination, Timing, cache_traffic, combinations_of, random_prompt, summarize
from d3tom_export.cost.flops import Workload
from d3tom_export.families.registry import read_config
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


def test_combinations_run_on_their_loop_and_merge_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[str, str]] = []

    def loop(backend: Any, prompt: Any, mask: int, generation: Any, merge: MergeConfig) -> list[int]:
        runs.append((backend, merge.schedule))
        return [1]

    monkeypatch.setattr(bench, "run_loop", loop)
    backends: Any = {"uncached": "plain", "cached": "cache"}
    merge, generation = MergeConfig(1, 0.5), GenerationConfig(4)
    timings = bench.time_combinations(backends, FOUR, random_prompt(LANGUAGE, 5, 20), 1, generation, merge, rounds=1)
    assert list(timings) == FOUR
    every = {("plain", "none"), ("plain", "adaptive"), ("cache", "none"), ("cache", "adaptive")}
    assert set(runs[:4]) == set(runs[4:]) == every


def test_an_answer_is_timed_from_before_it_starts() -> None:
    """Prefill happens when the loop is started, before its first step."""

    def answer() -> list[int]:
        time.sleep(0.02)
        return [1, 2]

    timing = bench.time_answer(answer)
    assert timing.first_token >= 0.02
    assert len(timing.steps) == 1
    assert timing.total == pytest.approx(timing.first_token + sum(timing.steps))


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that turns three times as slow leaves them alone."""
    plain = [Timing(1.0, (1.0,), 2.0), Timing(3.0, (3.0,), 6.0), Timing(1.0, (1.0,), 2.0)]
    fast = [Timing(0.5, (0.5,), 1.0), Timing(1.5, (1.5,), 3.0), Timing(0.5, (0.5,), 0.8)]
    timings = {FOUR[0]: plain, FOUR[3]: fast}
    rows = summarize(timings, {}, LANGUAGE, WORK, GenerationConfig(4), MergeConfig(1, 0.5))
    assert rows[1]["speedup"] == {"median": 2.0, "min": 2.0, "max": 2.5}
    assert rows[1]["tokens_per_second"] == 4.0
    assert rows[1]["answer_seconds"] == {"median": 1.0, "min": 0.8, "max": 3.0}
    assert rows[1]["first_token_seconds"]["median"] == 0.5
    assert rows[1]["of_flop_ideal"] == pytest.approx(2.0 / rows[1]["flop_ideal_speedup"], abs=1e-3)
    assert rows[0]["flop_ideal_speedup"] == 1.0
    assert [row["peak_bytes"] for row in rows] == [None, None]


def test_an_answer_of_one_step_has_no_later_ones() -> None:
    timings = {FOUR[0]: [Timing(1.0, (), 1.0)]}
    (row,) = summarize(timings, {}, LANGUAGE, WORK, GenerationConfig(1), MergeConfig(1, 0.5))
    assert row["step_seconds"]["median"] == 0.0


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
    sizes = cache_traffic(LANGUAGE, WORK, 1, MergeConfig(1, 0.5, schedule, cache=cache), GenerationConfig(4))
    expected = {"full": 30 * 4, "merged": merged, "read_per_step": read, "written_per_step": written}
    assert sizes == {name: rows * row for name, rows in expected.items()}


def test_cache_traffic_of_a_merged_prefill_holds_no_full_cache_behind_the_layer() -> None:
    row, merge = 2 * 2 * 8 * 4, MergeConfig(1, 0.5, "fixed", merge_at="prefill")
    sizes = cache_traffic(LANGUAGE, WORK, 1, merge, GenerationConfig(4))
    expected = {"full": 30 * 2, "merged": 20 * 2, "read_per_step": 30 * 2 + 20 * 2, "written_per_step": 0}
    assert sizes == {name: rows * row for name, rows in expected.items()}


def test_a_random_prompt_has_the_sizes_asked_for() -> None:
    prompt = random_prompt(LANGUAGE, text_tokens=10, visual_tokens=20, batch=3)
    assert prompt.embeddings.shape == (3, 30, 32)
    assert prompt.embeddings.dtype == np.float32
    np.testing.assert_array_equal(prompt.visual_positions, np.arange(2, 22))


def test_an_unmerged_combination_switches_merging_off() -> None:
    base = MergeConfig(1, 0.5)
    assert Combination("cached", False).merge(base).schedule == "none"
    assert Combination("cached", True).merge(base) is base
    assert [combination.label for combination in FOUR] == ["uncached", "uncached + D3ToM", "cached", "cached + D3ToM"]
    held = Combination("cached", True, "per-block")
    assert held.label == "cached + D3ToM, per-block"
    assert held.merge(base).cache.remerge == "per-block"
