"""The kernels' benchmark: what of it needs no GPU, and its answer where there is none."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from benchmarks.merge_kernels import floor_bytes, main, spread, table
from d3tom_export.plugins.launch import MergeSizes


def test_the_floor_is_two_passes() -> None:
    assert floor_bytes(MergeSizes(1, 1008, 100, 4096, 4096), 2) == 2 * 1008 * 4096 * 2


def test_spread_is_the_middle_eighty_per_cent() -> None:
    found = spread([index * 1e-6 for index in range(101)])
    assert found == pytest.approx({"median_us": 50, "p10_us": 10, "p90_us": 90})


def test_the_table_names_every_contender_and_the_ratios() -> None:
    times = {name: spread([seconds] * 5) for name, seconds in {"kernels": 1e-5, "pytorch": 5e-5, "order": 2e-6}.items()}
    head, rule, row = table([{"dtype": "float16", "kept": 100, "floor_us": 4.0, "times": times}]).splitlines()
    assert head == "| dtype | K | floor | kernels | pytorch | order | kernels / floor | pytorch / kernels |"
    assert rule.count("|") == head.count("|") == row.count("|")
    assert row.startswith("| float16 | 100 | 4.0 | 10.0 (10.0-10.0) | 50.0")
    assert row.endswith("| 2.50 | 5.00 |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    result = CliRunner().invoke(main)
    assert result.exit_code == 1
    assert "NVIDIA GPU" in result.output
    assert "nvidia-smi" in result.output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU that torch can use here")
def test_on_a_gpu_it_measures() -> None:
    result = CliRunner().invoke(main, ["--rounds", "5"])
    assert result.exit_code == 0, result.output
    assert result.output.count("\n| ") >= 7
