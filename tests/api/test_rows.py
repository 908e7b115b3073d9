"""Rows of a batch in the loop: each has the steps and the tokens that it has alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.api.batches import RowRecords
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.loop.denoise import StepRecord, StepResult, denoise
from tests.loop.test_ends import MASK, SETTINGS, Noise

MERGES = st.builds(
    MergeConfig,
    layer=st.just(0),
    ratio=st.sampled_from([0.5, 0.9]),
    schedule=st.sampled_from(["adaptive", "fixed", "none"]),
    select=st.sampled_from(["decider", "random"]),
    deciders=st.sampled_from(["committed", "looking"]),
)


class FirstTokens(Noise):
    """Its answers begin with a token of the prompt's, which may be a mask."""

    def __init__(self, seed: int, rows: int) -> None:
        super().__init__(seed)
        drawn = [int(np.random.default_rng([9, seed + row]).integers(0, 4)) for row in range(rows)]
        self.first_token = np.array([MASK if token == 3 else token for token in drawn])


def _run(
    generation: GenerationConfig, merge: MergeConfig, seed: int, rows: int, first_token: bool
) -> tuple[list[StepRecord], RowRecords]:
    session = FirstTokens(seed, rows) if first_token else Noise(seed)
    noisy = generation.temperature > 0 or merge.select == "random"
    seen = RowRecords(rows, noisy=noisy, at_prefill=False)
    records = []
    for record in denoise(
        session,
        batch=rows,
        visual_tokens=20,
        mask_token_id=MASK,
        generation=generation,
        merge=merge,
        seeds=[seed * 7 + row for row in range(rows)],
    ):
        records.append(record)
        seen.add(record)
    return records, seen


@given(SETTINGS, MERGES, st.integers(0, 10_000), st.integers(2, 4), st.booleans(), st.booleans(), st.booleans())
def test_a_row_has_the_steps_and_tokens_that_it_has_alone(
    generation: GenerationConfig,
    merge: MergeConfig,
    seed: int,
    rows: int,
    early_exit: bool,
    vanilla: bool,
    first_token: bool,
) -> None:
    if generation.planned and vanilla:  # its first steps may commit nothing
        generation = replace(generation, schedule="vanilla")
    elif not generation.planned and merge.schedule == "adaptive":  # api/batches.py runs these alone
        merge = replace(merge, schedule="fixed")
    generation = replace(generation, early_exit=early_exit)
    records, together = _run(generation, merge, seed, rows, first_token)
    noisy = generation.temperature > 0 or merge.select == "random"
    # What may make rows differ is found, and is rare: a mask for a first token, or noise over several blocks.
    assert together.independent or first_token or (noisy and generation.blocks > 1)
    for row in range(rows):
        if not together.independent:
            continue
        alone = [*denoise(
            _alone(seed + row, first_token),
            batch=1,
            visual_tokens=20,
            mask_token_id=MASK,
            generation=generation,
            merge=merge,
            seeds=[seed * 7 + row],
        )]  # fmt: skip
        mine = [record for record in records if record.working is not None and record.working[row]]
        assert [(each.block, each.step) for each in mine] == [(each.block, each.step) for each in alone]
        assert together.kept[row] == [each.keep for each in alone]
        last = together.last[row]
        assert last is not None
        assert np.array_equal(last.tokens[row], alone[-1].tokens[0])
        assert last.end[row] == alone[-1].end[0]


def _alone(seed: int, first_token: bool) -> Noise:
    return FirstTokens(seed, 1) if first_token else Noise(seed)


def test_a_batch_that_ends_apart_does_end_apart() -> None:
    """So that the property above is about something."""
    generation = GenerationConfig(gen_length=12, end_ids=(7, 8), early_exit=True)
    records, rows = _run(generation, MergeConfig(0, 0.8), 3, 4, False)
    lengths = [len(kept) for kept in rows.kept]
    assert len(set(lengths)) > 1
    assert max(lengths) == len(records)
    assert rows.independent


def test_rows_that_are_not_as_alone_are_told() -> None:
    ids, none, all_ = np.zeros((2, 2), np.int64), np.zeros((2, 2), np.bool_), np.ones(2, np.bool_)
    result = StepResult(ids, np.ones((2, 2)), None)

    def record(merged: bool, transfer: np.ndarray, working: np.ndarray) -> StepRecord:
        return StepRecord(0, 0, 1, merged, ids, transfer, np.array([2, 2]), result, working=working)

    first = np.array([[True, False], [False, False]])
    undecided = RowRecords(2, noisy=False, at_prefill=False)
    undecided.add(record(False, first, all_))
    assert undecided.independent
    undecided.add(record(True, none, all_))  # the second row had merged nothing alone: nobody decides there
    assert not undecided.independent
    at_prefill = RowRecords(2, noisy=False, at_prefill=True)
    at_prefill.add(record(True, none, all_))
    assert at_prefill.independent
    for noisy in (False, True):
        idled = RowRecords(2, noisy=noisy, at_prefill=False)
        for working in (all_, np.array([True, False]), all_):
            idled.add(record(False, first, working))
        assert idled.independent is not noisy
        assert [len(kept) for kept in idled.kept] == [3, 2]


def test_a_row_holds_no_logits() -> None:
    """A gigabyte of them, at real size."""
    _, rows = _run(GenerationConfig(gen_length=4, temperature=1.0), MergeConfig(0, 0.5), 1, 2, False)
    assert all(last is not None and last.result.logits is None for last in rows.last)
