"""The loop itself, on a session whose answers are known: plan, blocks, deciders, commits, and failing closed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from d3tom_export.config import Certainty, GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.denoise import StepRequest, StepResult, denoise, uniform_selection_scores
from d3tom_export.loop.ends import Stops

MASK = 99
NEVER = MergeConfig(0, 0.5, "none")


class Scripted:
    """Predicts token ``10 + position`` everywhere, more confident the further right; remembers its requests."""

    first_token: np.ndarray | None = None

    def __init__(self) -> None:
        self.requests: list[StepRequest] = []

    def step(self, request: StepRequest) -> StepResult:
        self.requests.append(request)
        token = np.tile(10 + np.arange(request.answer_ids.shape[1]), (len(request.answer_ids), 1))
        logits = np.full((*token.shape, 40), -5.0, dtype=np.float32)
        np.put_along_axis(logits, token[..., None], token[..., None] * 0.1, axis=-1)
        kept = np.tile(np.arange(request.keep), (len(token), 1))
        certainty = token / 100.0 if request.certainty else None
        return StepResult(token, token / 100.0, kept, logits if request.logits else None, certainty=certainty)


def _run(generation: GenerationConfig, merge: MergeConfig, visual: int = 20, batch: int = 1) -> tuple[list, Scripted]:
    session = Scripted()
    records = list(
        denoise(session, batch=batch, visual_tokens=visual, mask_token_id=MASK, generation=generation, merge=merge)
    )
    return records, session


def test_fills_blocks_left_to_right_and_never_masks_again() -> None:
    records, _ = _run(GenerationConfig(gen_length=8, block_length=4, step_ratio=0.5), MergeConfig(0, 0.5))
    assert [(record.block, record.step) for record in records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [np.flatnonzero(record.transfer[0]).tolist() for record in records] == [[2, 3], [0, 1], [6, 7], [4, 5]]
    assert records[-1].tokens[0].tolist() == list(range(10, 18))
    assert (records[1].tokens[0][4:] == MASK).all()


def test_deciders_are_the_last_commits_and_cross_block_borders() -> None:
    records, session = _run(GenerationConfig(gen_length=8, block_length=4, step_ratio=0.5), MergeConfig(0, 0.5))
    assert not session.requests[0].deciders.any()
    for request, before in zip(session.requests[1:], records, strict=False):
        assert np.array_equal(request.deciders, before.transfer)


def test_keeps_follow_the_schedule_and_the_first_step_never_merges() -> None:
    generation = GenerationConfig(gen_length=8, block_length=4)
    records, session = _run(generation, MergeConfig(0, 0.75))
    assert [request.keep for request in session.requests] == [20, 2, 5, 7, 1, 2, 5, 7]
    assert [record.merged for record in records] == [False] + [True] * 7
    _, fixed = _run(generation, MergeConfig(0, 0.75, "fixed"))
    assert [request.keep for request in fixed.requests] == [20] + [5] * 7
    _, never = _run(generation, MergeConfig(0, 0.75, "none"))
    assert {request.keep for request in never.requests} == {20}


def test_without_visual_tokens_nothing_merges() -> None:
    records, session = _run(GenerationConfig(gen_length=4), MergeConfig(0, 0.5), visual=0)
    assert {request.keep for request in session.requests} == {0}
    assert not any(record.merged for record in records)


@pytest.mark.parametrize(
    ("settings", "logits", "certainty"),
    [
        ({}, False, None),
        ({"remasking": "random"}, False, None),
        ({"remasking": "margin"}, False, "margin"),
        ({"remasking": "entropy"}, False, "entropy"),
        ({"temperature": 0.5}, True, None),
        ({"temperature": 0.5, "remasking": "margin"}, True, "margin"),
    ],
)
def test_a_step_asks_for_what_its_sampling_needs(settings: dict, logits: bool, certainty: str | None) -> None:
    _, session = _run(GenerationConfig(gen_length=4, **settings), MergeConfig(0, 0.5))
    asked = None if certainty is None else Certainty(certainty)  # type: ignore[arg-type]
    assert {(request.logits, request.certainty) for request in session.requests} == {(logits, asked)}


def test_dreams_sampler_ranks_on_the_host_where_it_draws() -> None:
    dream = {"rank_drawn": True, "remasking": "margin", "top_k": 5}
    for temperature, asked in ((0.0, Certainty("margin", 5, None, True)), (0.5, None)):
        _, session = _run(GenerationConfig(gen_length=4, temperature=temperature, **dream), MergeConfig(0, 0.5))  # type: ignore[arg-type]
        assert {(request.logits, request.certainty) for request in session.requests} == {(temperature > 0, asked)}


def test_outside_policies_get_their_scores() -> None:
    generation = GenerationConfig(gen_length=4, seed=7)
    _, random = _run(generation, MergeConfig(0, 0.5, select="random"), batch=2)
    _, again = _run(generation, MergeConfig(0, 0.5, select="random"), batch=2)
    scores = [request.selection_scores for request in random.requests]
    assert all(s is not None and s.shape == (2, 20) for s in scores)
    assert not np.array_equal(scores[0], scores[1])
    assert all(np.array_equal(s, r.selection_scores) for s, r in zip(scores, again.requests, strict=True))
    _, uniform = _run(generation, MergeConfig(0, 0.5, "fixed", select="uniform"))
    assert np.flatnonzero(uniform.requests[1].selection_scores[0]).tolist() == list(range(1, 20, 2))


@pytest.mark.parametrize(("visual", "keep"), [(20, 20), (20, 1), (7, 3), (1008, 100)])
def test_uniform_selection_picks_exactly_as_many_as_are_kept(visual: int, keep: int) -> None:
    assert int(uniform_selection_scores(visual, keep).sum()) == keep


class Broken(Scripted):
    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.changes = changes

    def step(self, request: StepRequest) -> StepResult:
        good = super().step(request)
        return StepResult(**{"token": good.token, "confidence": good.confidence, "kept": None, **self.changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"confidence": np.full((1, 4), np.nan)}, "not finite"),
        ({"token": np.zeros((1, 3), dtype=np.int64)}, "shape"),
    ],
)
def test_a_broken_step_stops_the_loop(changes: dict, says: str) -> None:
    loop = denoise(
        Broken(**changes),
        batch=1,
        visual_tokens=5,
        mask_token_id=MASK,
        generation=GenerationConfig(gen_length=4),
        merge=MergeConfig(0, 0.5),
    )
    with pytest.raises(D3tomError, match=says):
        next(loop)


def test_missing_logits_stop_the_loop() -> None:
    loop = denoise(
        Broken(logits=None),
        batch=1,
        visual_tokens=5,
        mask_token_id=MASK,
        generation=GenerationConfig(gen_length=4),
        merge=MergeConfig(0, 0.5),
        logits=True,
    )
    with pytest.raises(D3tomError, match="no logits"):
        next(loop)


def test_a_stop_ends_the_answer_once_all_before_it_is_filled() -> None:
    """The right is filled first: 14 at position 4 stops, positions 0 to 3 are still filled, 5 and beyond never more."""
    generation = GenerationConfig(gen_length=8, stop_ids=((40,), (14, 15)))
    records, _ = _run(generation, MergeConfig(0, 0.5))
    assert len(records) == 8  # 7, 6, 5, 4 (now 14 15 stands at 4), 3, 2, 1, 0
    assert records[3].end.tolist() == [4]
    assert [record.end[0] for record in records[:3]] == [8, 8, 8]
    assert records[-1].tokens[0, :4].tolist() == [10, 11, 12, 13]


def test_what_lies_behind_a_stop_is_not_committed() -> None:
    class Leftmost(Scripted):
        def step(self, request: StepRequest) -> StepResult:
            return replace(super().step(request), confidence=1.0 - np.tile(np.arange(8) / 10, (1, 1)))

    session = Leftmost()
    generation = GenerationConfig(gen_length=8, stop_ids=((12,),))
    records = list(denoise(session, batch=1, visual_tokens=0, mask_token_id=MASK, generation=generation, merge=NEVER))
    assert len(records) == 3
    assert records[-1].tokens[0].tolist() == [10, 11, 12, *[MASK] * 5]
    assert records[-1].end.tolist() == [2]
    two = list(
        denoise(
            Leftmost(),
            batch=1,
            visual_tokens=0,
            mask_token_id=MASK,
            generation=replace(generation, block_length=2),
            merge=NEVER,
        )
    )
    assert [record.block for record in two] == [0, 0, 1], "the blocks behind a stop are never begun"


def test_once_there_is_a_stop_only_the_first_sequence_moves_it() -> None:
    stops = Stops(((5,), (6,)), 1, 6)
    stops.look(np.array([[9, 9, 9, 6, 9, 9]]))
    assert stops.end.tolist() == [3]
    stops.look(np.array([[9, 6, 9, 6, 9, 9]]))
    assert stops.end.tolist() == [3]
    stops.look(np.array([[9, 6, 5, 6, 9, 9]]))
    assert stops.end.tolist() == [2]


def test_rows_of_a_batch_stop_apart() -> None:
    class Rows(Scripted):
        def step(self, request: StepRequest) -> StepResult:
            good = super().step(request)
            good.token[1] += 10
            return replace(good, confidence=1.0 - np.tile(np.arange(8) / 10, (2, 1)))

    generation = GenerationConfig(gen_length=8, stop_ids=((12,),))
    records = list(denoise(Rows(), batch=2, visual_tokens=0, mask_token_id=MASK, generation=generation, merge=NEVER))
    assert records[-1].end.tolist() == [2, 8]
    assert (records[-1].tokens[0] == MASK).sum() == 5
    assert (records[-1].tokens[1] != MASK).all()
    assert not records[-1].transfer[0].any()


def test_a_suffix_stands_behind_the_answer_and_never_changes() -> None:
    generation = GenerationConfig(gen_length=4, suffix_ids=(7, 8))
    records, session = _run(generation, MergeConfig(0, 0.5))
    for request in session.requests:
        assert request.answer_ids[0, 4:].tolist() == [7, 8]
        assert not request.deciders[0, 4:].any()
    for record in records:
        assert record.tokens.shape == record.transfer.shape == record.result.token.shape == (1, 4)
    assert records[-1].tokens[0].tolist() == [10, 11, 12, 13]


def test_a_first_token_is_there_before_the_first_step_and_decides_nothing() -> None:
    session = Scripted()
    session.first_token = np.array([77, MASK])
    generation = GenerationConfig(gen_length=4, schedule="vanilla")
    merge = MergeConfig(0, 0.5)
    records = list(denoise(session, batch=2, visual_tokens=9, mask_token_id=MASK, generation=generation, merge=merge))
    assert session.requests[0].answer_ids[:, 0].tolist() == [77, MASK]
    assert not session.requests[0].deciders.any()
    assert records[-1].tokens.tolist() == [[77, 11, 12, 13], [10, 11, 12, 13]]
    assert sum(record.transfer.sum() for record in records) == 7, "a mask that the prompt predicted stays a mask"


def test_an_answer_that_the_prompt_fills_has_one_step() -> None:
    session = Scripted()
    session.first_token = np.array([77])
    (record,) = denoise(
        session, batch=1, visual_tokens=0, mask_token_id=MASK, generation=GenerationConfig(gen_length=1), merge=NEVER
    )
    assert record.tokens.tolist() == [[77]]
    assert not record.transfer.any()


def test_deciders_outlive_a_step_that_commits_nothing() -> None:
    generation = GenerationConfig(gen_length=8, block_length=4, schedule="vanilla")  # [0, 1, 1, 2] a block
    records, session = _run(generation, MergeConfig(0, 0.5))
    assert [int(record.transfer.sum()) for record in records] == [0, 1, 1, 2] * 2
    assert np.array_equal(session.requests[5].deciders, records[3].transfer)
    assert [record.merged for record in records] == [False, False, *[True] * 6]
