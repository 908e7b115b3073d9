"""The loop itself, on a session whose answers are known: plan, blocks, deciders, commits, and failing closed."""

from __future__ import annotations

import numpy as np
import pytest

from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.denoise import StepRequest, StepResult, denoise, uniform_selection_scores

MASK = 99


class Scripted:
    """Predicts token ``10 + position`` everywhere, more confident the further right; remembers its requests."""

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
    assert {(request.logits, request.certainty) for request in session.requests} == {(logits, certainty)}


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
