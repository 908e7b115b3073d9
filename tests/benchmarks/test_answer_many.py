"""Batches beside single answers: all sizes answer the same questions, in float32 with the same tokens."""

from __future__ import annotations

import pytest

from benchmarks import answer_many
from d3tom_export.bundle.folder import Bundle


@pytest.mark.slow
def test_sizes_are_compared(tiny_bundle: Bundle) -> None:
    rows = answer_many.measure(tiny_bundle.folder, 9, [1, 2], kv_cache=True)
    assert [(row.batch, row.answers, row.same) for row in rows] == [(1, 9, 9), (2, 9, 9)]
    assert all(row.seconds > 0 and row.processor_seconds > 0 for row in rows)
    lines = answer_many.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
