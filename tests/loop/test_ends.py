"""Early exit, filling after the end, and deciders that look; commit rules in the loop: all on a session of noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.loop.denoise import StepRecord, StepRequest, StepResult, denoise
from d3tom_export.loop.ends import EndTokens, Stops

MASK, END, PAD, TOKENS = 30, 7, 8, 12
MERGE = MergeConfig(0, 0.8)


class Noise:
    """Tokens and confidences that depend on all that a step is given, and on nothing else; remembers its requests."""

    first_token: np.ndarray | None = None

    def __init__(self, seed: int, sharpness: float = 3.0) -> None:
        self.seed, self.sharpness, self.requests = seed, sharpness, []

    def step(self, request: StepRequest) -> StepResult:
        self.requests.append(request)
        batch, length = request.answer_ids.shape
        logits = np.empty((batch, length, TOKENS), dtype=np.float32)
        for row in range(batch):  # a row's are its own: ids, deciders and how many tokens it sees
            seen = [self.seed + row, request.keep, *request.answer_ids[row].tolist(), *request.deciders[row].tolist()]
            logits[row] = np.random.default_rng([int(each) for each in seen]).normal(
                0, self.sharpness, logits[row].shape
            )
        logits[..., END] += 2.0  # answers do end
        exact = np.exp(logits.astype(np.float64))
        probability = exact / exact.sum(axis=-1, keepdims=True)
        kept = np.tile(np.arange(request.keep), (batch, 1)) if request.merge else None
        return StepResult(logits.argmax(axis=-1), probability.max(axis=-1), kept, logits)


def _run(generation: GenerationConfig, merge: MergeConfig, seed: int, batch: int = 1) -> tuple[list[StepRecord], Noise]:
    session = Noise(seed)
    loop = denoise(session, batch=batch, visual_tokens=20, mask_token_id=MASK, generation=generation, merge=merge)
    return list(loop), session


def _text(record: StepRecord, row: int) -> list[int]:
    """What is read of an answer: up to its stop, and there up to the first end token."""
    said = record.tokens[row, : record.end[row]].tolist()
    ends = [at for at, token in enumerate(said) if token in (END, PAD)]
    return said[: ends[0] if ends else None]


SETTINGS = st.builds(
    GenerationConfig,
    gen_length=st.just(12),
    block_length=st.sampled_from([None, 4, 6]),
    step_ratio=st.sampled_from([None, 0.5]),
    commit=st.sampled_from(["plan", "threshold", "factor", "frechet"]),
    threshold=st.sampled_from([0.5, 0.9]),
    temperature=st.sampled_from([0.0, 0.7]),
    # The last may begin before the end token and be completed behind it.
    stop_ids=st.sampled_from([(), ((3,),), ((5, 2), (1,)), ((1, END, 4), (2, PAD))]),
    end_ids=st.just((END, PAD)),
    fill_after_end=st.booleans(),
    seed=st.integers(0, 5),
)


@given(SETTINGS, st.integers(0, 10_000), st.integers(1, 3), st.sampled_from(["committed", "looking"]))
def test_an_early_exit_changes_no_text(generation: GenerationConfig, seed: int, batch: int, deciders: str) -> None:
    merge = replace(MERGE, deciders=deciders)  # type: ignore[arg-type]
    whole, _ = _run(generation, merge, seed, batch)
    early, session = _run(replace(generation, early_exit=True), merge, seed, batch)
    assert 1 <= len(early) <= len(whole)
    for row in range(batch):
        assert _text(early[-1], row) == _text(whole[-1], row)
        assert MASK not in _text(early[-1], row)
    for ours, theirs in zip(early, whole, strict=False):  # up to there nothing differs
        assert np.array_equal(ours.tokens, theirs.tokens)
        assert ours.keep == theirs.keep
    assert len(session.requests) == len(early)


def test_an_early_exit_saves_steps_and_waits_for_every_row() -> None:
    generation = GenerationConfig(12, end_ids=(END,), early_exit=True, commit="threshold", threshold=0.6)
    saved = []
    for seed in range(40):
        for batch in (1, 3):
            early, _ = _run(generation, MERGE, seed, batch)
            whole, _ = _run(replace(generation, early_exit=False), MERGE, seed, batch)
            saved.append(len(whole) - len(early))
            ends = EndTokens((END,), MASK)
            settled = [ends.settled(record.tokens, Stops((), batch, 12)).all() for record in whole]
            assert len(early) == (settled.index(True) + 1 if any(settled) else len(whole))
    assert min(saved) == 0 < max(saved)


def test_a_stop_that_may_yet_begin_before_the_end_keeps_the_answer_open() -> None:
    ends, tokens = EndTokens((END,), MASK), np.array([[1, END, MASK, 4]])
    assert ends.settled(tokens, Stops((), 1, 4)).all()
    assert not ends.settled(tokens, Stops(((1, END, 4),), 1, 4)).any()
    assert ends.settled(tokens, Stops(((2, END, 4), (END, 4)), 1, 4)).all()


@given(SETTINGS, st.integers(0, 10_000), st.integers(1, 3))
def test_filling_leaves_only_end_tokens_behind_the_end(generation: GenerationConfig, seed: int, batch: int) -> None:
    records, _ = _run(replace(generation, fill_after_end=True), MERGE, seed, batch)
    before = np.full((batch, 12), MASK)
    for record in records:
        assert record.filled is not None
        assert not (record.filled & ~record.transfer).any()
        assert (before[record.transfer] == MASK).all()
        for row, tokens in enumerate(record.tokens):
            places = np.flatnonzero(np.isin(tokens, (END, PAD)))
            behind = record.filled[row]
            if behind.any():
                assert (np.flatnonzero(behind) > places[0]).all()
                assert set(tokens[behind]) == {tokens[places[0]]}
            if len(places):
                assert MASK not in tokens[places[0] : record.end[row]]
        before = record.tokens


@given(SETTINGS, st.integers(0, 10_000), st.integers(1, 3))
def test_deciders_that_look_are_no_end_tokens_where_others_were_committed(
    generation: GenerationConfig, seed: int, batch: int
) -> None:
    records, session = _run(generation, replace(MERGE, deciders="looking"), seed, batch)
    for record, request in zip(records, session.requests[1:], strict=False):
        for row in np.flatnonzero(record.transfer.any(axis=1)):
            deciders, committed = request.deciders[row], record.transfer[row]
            tokens, spoken = record.tokens[row], committed & ~np.isin(record.tokens[row], (END, PAD))
            places = np.flatnonzero(np.isin(tokens, (END, PAD)))
            masks = (tokens == MASK) & (np.arange(12) < (places[0] if len(places) else 12))
            expected = spoken if spoken.any() else masks if masks.any() else committed
            assert np.array_equal(deciders, expected)


@pytest.mark.parametrize("block_length", [None, 4])
@given(seed=st.integers(0, 1000), ratio=st.sampled_from([0.3, 0.5, 0.9]))
def test_at_one_token_a_step_a_rules_clock_is_the_plans(block_length: int | None, seed: int, ratio: float) -> None:
    plan = GenerationConfig(12, block_length)
    # Nothing is this sure, so that only the surest token is committed.
    rule = replace(plan, commit="threshold", threshold=1.0)
    merge = replace(MERGE, ratio=ratio)
    (planned, _), (ruled, _) = _run(plan, merge, seed), _run(rule, merge, seed)
    assert [record.keep for record in ruled] == [record.keep for record in planned]
    assert [record.tokens.tolist() for record in ruled] == [record.tokens.tolist() for record in planned]


@given(SETTINGS.filter(lambda settings: not settings.planned), st.integers(0, 1000), st.integers(1, 3))
def test_a_rule_fills_every_block_before_the_next_and_keeps_to_its_most_steps(
    generation: GenerationConfig, seed: int, batch: int
) -> None:
    generation = replace(generation, stop_ids=(), fill_after_end=False)
    for most in (None, 1, 2):
        bounded = replace(generation, max_steps=most)
        records, _ = _run(bounded, MERGE, seed, batch)
        assert MASK not in records[-1].tokens
        assert len(records) <= bounded.total_steps
        size, before = generation.block, np.full((batch, 12), MASK)
        for record in records:
            stop = (record.block + 1) * size
            assert not record.transfer[:, stop:].any()
            assert MASK not in record.tokens[:, : stop - size]
            work = (before[:, :stop] == MASK).any(axis=1)
            assert np.array_equal(record.transfer.any(axis=1), work)  # whoever has a mask commits one
            before = record.tokens


@given(st.integers(0, 1000))
def test_rows_of_a_batch_commit_apart_where_nothing_merges(seed: int) -> None:
    generation = GenerationConfig(12, 6, commit="factor", end_ids=(END,))
    unmerged = replace(MERGE, schedule="none")
    together, _ = _run(generation, unmerged, seed, batch=3)
    lengths = []
    for row in range(3):
        alone, _ = _run(generation, unmerged, seed + row)
        assert together[-1].tokens[row].tolist() == alone[-1].tokens[0].tolist()
        lengths.append(len(alone))
    assert len(together) >= max(lengths)
