"""The scaling benchmark: one factor at a time, ratios to the FLOP model's, and one whole run at tiny sizes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest

from benchmarks.proportions import LAVIDA, SMALL
from benchmarks.scaling import Sweep, run, table
from d3tom_export.bundle.folder import Bundle
from d3tom_export.cost.flops import Workload, uncached_step
from tests.conftest import raw_config


def test_one_factor_varies_at_a_time() -> None:
    points = Sweep().points(LAVIDA)
    assert [(point.factor, point.value) for point in points] == [
        *(("V", value) for value in (256, 512, 1008, 2048, 4096)),
        *(("G", value) for value in (32, 64, 128, 256)),
        *(("layers", value) for value in (6, 12, 24)),
    ]
    own = (1008, 64, 12)
    for point in points:
        sizes = (point.visual_tokens, point.answer_tokens, point.layers)
        assert sum(one != other for one, other in zip(sizes, own, strict=True)) <= 1


def test_a_run_measures_every_point_in_both_loops(bundle: Bundle) -> None:
    asked = []

    def bundle_of(_: object, layers: int) -> nullcontext[Bundle]:
        asked.append(layers)
        return nullcontext(bundle)

    result = run(replace(SMALL, config=raw_config()), Sweep((16, 48), (4,), (4,)), 2, bundle_of)
    assert asked == [4]  # points of one depth share a bundle
    rows = result["rows"]
    assert [(row["loop"], row["factor"], row["value"]) for row in rows] == [
        (loop, factor, value)
        for loop in ("uncached", "cached")
        for factor, value in (("V", 16), ("V", 48), ("G", 4), ("layers", 4))
    ]
    first = rows[0]
    plain = uncached_step(bundle.config.language, Workload(26, 16, 8), 1, None).flops
    assert first["unmerged"]["flops"] == plain
    assert first["keep"] == 4  # int(16 * 0.3)
    for row in rows:
        assert row["of_flop_ideal"] == pytest.approx(row["ratio"]["median"] / row["flop_ideal"], abs=1e-3)
        assert row["unmerged"]["step_seconds"]["min"] > 0
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
