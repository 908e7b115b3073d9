"""The cut modules' counting and gathering against plain sorting, and whole stages against the oracle in eager mode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d3tom_export.config import MergeConfig
from d3tom_export.merging.forward import Merging, forward
from d3tom_export.merging.importance import most_important
from d3tom_export.model.lavida import Lavida
from d3tom_export.stages.cut import stage_modules
from d3tom_export.stages.ops import batch_rows, compact, rank_scores

scores = st.lists(st.sampled_from([-1.0, 0.0, 1e-30, 0.5, 0.5000001, 2.0]), min_size=1, max_size=25)


@given(scores, st.integers(1, 25))
@settings(deadline=None)
def test_ranking_by_counting_selects_what_sorting_selects(values: list[float], keep: int) -> None:
    keep = min(keep, len(values))
    batch = torch.tensor([values, values[::-1]])
    order = torch.arange(len(values)).expand(2, -1)
    assert torch.equal(compact(rank_scores(batch) < keep, order, keep), most_important(batch, keep))


@given(st.lists(st.booleans(), min_size=1, max_size=20))
@settings(deadline=None)
def test_compact_lists_the_selected_in_order(selected: list[bool]) -> None:
    mask = torch.tensor([selected])
    values = torch.arange(10, 10 + len(selected)).unsqueeze(0)
    assert compact(mask, values, int(mask.sum())).tolist() == [values[mask].tolist()]


def test_batch_rows_gathers_within_each_row_of_the_batch() -> None:
    x = torch.randn(3, 5, 2)
    index = torch.tensor([[4, 0], [1, 1], [2, 3]])
    expected = torch.stack([x[b, index[b]] for b in range(3)])
    assert torch.equal(batch_rows(x, index), expected)


CONFIGURATIONS = [
    MergeConfig(0, 0.5),
    MergeConfig(3, 0.5),
    MergeConfig(1, 0.5, aggregate="mean"),
    MergeConfig(1, 0.5, positions="original"),
    MergeConfig(1, 0.5, select="fastv"),
    MergeConfig(1, 0.5, select="random"),
    MergeConfig(2, 0.5, select="uniform", positions="original"),
]


@pytest.mark.parametrize("merge", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize(("batch", "visual", "keep"), [(1, 7, 7), (1, 30, 1), (3, 21, 9)])
@torch.no_grad()
def test_stages_chain_to_the_oracle(
    eager_model: Lavida, merge: MergeConfig, batch: int, visual: int, keep: int
) -> None:
    torch.manual_seed(visual)
    prompt_tokens, answer_tokens = visual + 8, 6
    embeddings = torch.randn(batch, prompt_tokens + answer_tokens, 32)
    deciders = torch.zeros(batch, answer_tokens, dtype=torch.bool)
    for row in range(batch):
        deciders[row, (row, row + 2)] = True
    positions = torch.arange(5, 5 + visual)
    outside = torch.rand(batch, visual) if merge.select in ("random", "uniform") else None

    expected = forward(
        eager_model.transformer, embeddings, answer_tokens, Merging(merge, deciders, positions, keep, outside)
    )
    stages = stage_modules(eager_model, merge, ["uncached"])
    hidden = stages["front"](embeddings[:, :prompt_tokens], embeddings[:, prompt_tokens:])
    merge_inputs = [hidden, deciders, positions, torch.tensor([keep])]
    merged, kept, *sequence = stages["merge"](*merge_inputs, *([] if outside is None else [outside]))
    token, confidence, doubt, logits = stages["back"](merged, torch.tensor([answer_tokens]), *sequence)

    assert torch.equal(kept, expected.kept)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    tokens = eager_model.config.language.vocab_rows  # of the head's rows those that have a token come first
    assert torch.equal(token, logits[..., :tokens].argmax(-1))
    probability = torch.softmax(logits.double(), -1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(confidence.double(), probability, atol=1e-6, rtol=0)
    torch.testing.assert_close(1 / (1 + doubt.double()), probability, atol=1e-6, rtol=0)


@torch.no_grad()
def test_doubt_tells_apart_what_float32_confidence_cannot(eager_model: Lavida) -> None:
    back = stage_modules(eager_model, MergeConfig(3, 0.5), ["uncached"])["back"]
    head = torch.zeros(eager_model.config.language.head_rows, 32)
    head[0, 0], head[1, 1] = 20.0, 21.0
    back.head.ln_f, back.head.ff_out = torch.nn.Identity(), torch.nn.Linear(32, len(head), bias=False)
    back.head.ff_out.weight = torch.nn.Parameter(head)
    rows = torch.zeros(1, 2, 32)
    rows[0, 0, 0] = rows[0, 1, 1] = 1.5
    _, confidence, doubt, _ = back(rows, torch.tensor([2]))
    assert confidence.tolist() == [[1.0, 1.0]]
    assert 0 < doubt[0, 1] < doubt[0, 0]
