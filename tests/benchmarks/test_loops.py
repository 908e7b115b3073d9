"""The loops' benchmark: its arithmetic, and one whole run at tiny sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import contestants, gemm_rate
from benchmarks.contestants import CONTESTANTS, of_bundle
from benchmarks.loops import Answer, Entry, departure, entries, rows, run, table
from benchmarks.proportions import LAVIDA, SMALL
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import LOOPS
from d3tom_export.cost.bench import Timing
from d3tom_export.cost.combinations import Combination
from d3tom_export.families.registry import read_config
from tests.conftest import raw_config

EAGER = [contestant for contestant in CONTESTANTS if contestant.float32 and not contestant.compiles]


SIZES = replace(SMALL, config=raw_config())
"""Of the suite's own bundle, which other tests need too."""


def test_the_proportions_are_a_model_s() -> None:
    """The benchmarks' own configurations, in place of which the suite's bundle stands in these tests."""
    assert [read_config(dict(each.config)).language.d_model for each in (LAVIDA, SMALL)] == [512, 32]


def test_only_who_can_hold_a_merge_is_asked_to() -> None:
    wanted = entries(CONTESTANTS, per_block=True)
    held = {entry.contestant for entry in wanted if entry.combination.remerge == "per-block"}
    on_ort = {"onnxruntime", "onnxruntime int8"}
    assert held == {"pytorch", "compiled", *on_ort, *(f"{name}, merge library" for name in on_ort)}
    assert len(wanted) == 4 * len(CONTESTANTS) + len(held)
    assert wanted[0] == Entry("release", Combination("uncached", "unmerged"))


def test_a_departure_is_found_at_its_step() -> None:
    first = [np.array([[1, 9]]), np.array([[1, 2]])]
    assert departure(first, first) == {"equal": 1.0, "first_other_step": None}
    assert departure([first[0], np.array([[1, 3]])], first) == {"equal": 0.5, "first_other_step": 1}


def test_ratios_are_to_the_same_work_and_to_the_same_engine(bundle: Bundle) -> None:
    """The second round is twice as slow for all, which no ratio shows."""
    plain, merged = Combination("uncached", "unmerged"), Combination("uncached", "step")
    seconds = {("slow", plain): 8.0, ("slow", merged): 4.0, ("fast", plain): 2.0, ("fast", merged): 0.5}
    timings, answers = {}, {}
    for (name, combination), total in seconds.items():
        entry = Entry(name, combination)
        timings[entry] = [Timing(total / 2, (total / 2,), total), Timing(total, (total,), 2 * total)]
        answers[entry] = Answer(EAGER[0].open(bundle, "uncached"), combination, SIZES)
        answers[entry].tokens = [np.array([[1, 2]])]
    found = {
        (row["contestant"], row["combination"]): row
        for row in rows(timings, {Entry("fast", merged): 5.75}, answers, bundle, SIZES)
    }
    row = found["fast", "uncached + D3ToM"]
    assert row["over_base"] == {"median": 8.0, "min": 8.0, "max": 8.0}
    assert row["over_unmerged"]["median"] == 4.0
    assert row["flop_ideal"] > 1.0
    assert row["of_flop_ideal"] == pytest.approx(4.0 / row["flop_ideal"], abs=1e-3)
    assert row["gflop_per_second"] == round(row["flops"] / 0.75 / 1e9, 1)
    assert row["compile_seconds"] == 5.0
    assert found["fast", "uncached"]["over_unmerged"] is None


def test_a_run_compares_every_contestant_in_every_combination(bundle: Bundle) -> None:
    everyone = [*EAGER, of_bundle("again", bundle)]
    result = run(everyone, bundle, SIZES, rounds=1, per_block=True, gemm_seconds=0.001)
    assert [(row["contestant"], row["combination"]) for row in result["rows"]] == [
        (entry.contestant, entry.combination.label) for entry in entries(everyone, per_block=True)
    ]
    for row in result["rows"]:
        assert row["tokens"] == {"equal": 1.0, "first_other_step": None}, row
    lines = table(result["rows"]).splitlines()
    assert len(lines) == 2 + len(result["rows"])
    assert len({line.count("|") for line in lines}) == 1


def test_both_runtimes_multiply_the_whole_chain() -> None:
    assert gemm_rate.chain_flops(64) == 4 * 2 * (2 * 64 * 512 * 1536)
    rates = gemm_rate.measured((8,), seconds=0.001)
    assert all(value[8] > 0 for value in rates.values())
    assert gemm_rate.table(rates).count("\n") == 1 + len(rates)


def test_a_compiled_contestant_replaces_blocks_of_a_model_of_its_own(bundle: Bundle) -> None:
    """What is compiled is what the entry says; the eager contestants stay eager. Nothing waits for the compiler."""
    (compiled,) = (one for one in CONTESTANTS if one.compiles)
    for loop in LOOPS:
        compiled.open(bundle, loop)
    blocks = {
        name: contestants._model(bundle, name).transformer.blocks[0]
        for name in ("eager", "compiled uncached", "compiled cached")
    }
    whole = {name: block._compiled_call_impl is not None for name, block in blocks.items()}
    parts = {name: "attend" in vars(block) for name, block in blocks.items()}
    assert whole == {"eager": False, "compiled uncached": True, "compiled cached": False}
    assert parts == {"eager": False, "compiled uncached": False, "compiled cached": True}
