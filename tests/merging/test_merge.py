"""Selection and merging: the oracle against straightforward Python, for any shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from d3tom_export.merging.importance import attention_rows, decider_importance, most_important, visual_scores
from d3tom_export.merging.merge import NearTie, merge_tokens, near_ties, nearest_kept


@st.composite
def merges(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (B, V, D), normed (B, V, D) with repeated rows among them, kept (B, K)."""
    batch, visual, width = draw(st.integers(1, 3)), draw(st.integers(1, 24)), draw(st.integers(1, 9))
    keep = draw(st.integers(1, visual))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    hidden = torch.randn(batch, visual, width, generator=generator)
    normed = torch.randn(batch, visual, width, generator=generator)
    if draw(st.booleans()):  # rows along the axes: similarities are exactly 0 or 1, with many ties
        axes = torch.eye(width)[torch.randint(0, width, (batch, visual), generator=generator)]
        normed = axes * 2.0 ** torch.randint(-3, 4, (batch, visual, 1), generator=generator)
    kept = torch.stack([torch.randperm(visual, generator=generator)[:keep].sort().values for _ in range(batch)])
    return hidden, normed, kept


def _merge_in_python(hidden: torch.Tensor, normed: torch.Tensor, kept: torch.Tensor) -> np.ndarray:
    unit = (normed / normed.norm(dim=-1, keepdim=True).clamp(min=1e-12)).double().numpy()
    merged = np.stack([hidden[b].double().numpy()[kept[b].numpy()] for b in range(len(kept))])
    for b, rows in enumerate(kept.tolist()):
        for token in set(range(hidden.shape[1])) - set(rows):
            similarities = [float(np.float32(unit[b, token] @ unit[b, row])) for row in rows]
            merged[b, int(np.argmax(similarities))] += hidden[b, token].double().numpy()
    return merged


@given(merges())
@settings(deadline=None)
def test_sums_each_token_into_its_most_similar_kept_token(case: tuple[torch.Tensor, ...]) -> None:
    hidden, normed, kept = case
    np.testing.assert_allclose(merge_tokens(hidden, normed, kept).numpy(), _merge_in_python(*case), atol=1e-4)


@given(merges())
@settings(deadline=None)
def test_nothing_is_lost_and_kept_tokens_stay_with_themselves(case: tuple[torch.Tensor, ...]) -> None:
    hidden, normed, kept = case
    nearest = nearest_kept(normed, kept)
    assert torch.equal(nearest.gather(1, kept), torch.arange(kept.shape[1]).expand_as(kept))
    np.testing.assert_allclose(merge_tokens(hidden, normed, kept).sum(1), hidden.sum(1), atol=1e-3)


@given(merges())
@settings(deadline=None)
def test_mean_divides_by_the_number_of_rows_taken_in(case: tuple[torch.Tensor, ...]) -> None:
    hidden, normed, kept = case
    counts = merge_tokens(torch.ones_like(hidden[..., :1]), normed, kept)
    assert counts.sum().item() == hidden.shape[0] * hidden.shape[1]
    mean = merge_tokens(hidden, normed, kept, "mean")
    np.testing.assert_allclose((mean * counts).numpy(), merge_tokens(hidden, normed, kept).numpy(), atol=1e-4)


def test_keeping_everything_changes_nothing() -> None:
    hidden, normed = torch.randn(2, 2, 7, 5)
    everything = torch.arange(7).expand(2, 7)
    assert torch.equal(merge_tokens(hidden, normed, everything), hidden)


def test_ties_of_similarity_go_to_the_lower_kept_token() -> None:
    normed = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]])
    kept = torch.tensor([[1, 2]])
    # Tokens 0, 1 and 2 point the same way: 0 joins the first of the two, both of which keep themselves.
    assert nearest_kept(normed, kept).tolist() == [[0, 0, 1, 0]]


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=30), st.integers(1, 30), st.integers(1, 3))
def test_most_important_breaks_ties_towards_the_lower_position(scores: list[float], keep: int, batch: int) -> None:
    keep = min(keep, len(scores))
    kept = most_important(torch.tensor([scores] * batch), keep)
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert kept.tolist() == [sorted(ranked[:keep])] * batch


def test_importance_is_the_sum_of_the_decider_rows_averaged_over_heads() -> None:
    queries, keys = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 9, 4)
    deciders = torch.tensor([[True, False, True, False, False], [False, True, False, False, True]])
    attention = torch.softmax(queries @ keys.transpose(-1, -2) / 2.0, dim=-1).mean(1)
    expected = torch.stack([attention[0, [0, 2]].sum(0), attention[1, [1, 4]].sum(0)])
    torch.testing.assert_close(decider_importance(attention_rows(queries, keys), deciders), expected)


def test_fastv_reads_the_last_prompt_row() -> None:
    queries, keys = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    deciders = torch.ones(1, 3, dtype=torch.bool)
    visual = torch.tensor([1, 2, 4])
    rows = attention_rows(queries, keys)
    torch.testing.assert_close(visual_scores("fastv", queries, keys, deciders, visual), rows[:, 5, visual])


def test_scores_are_float32_in_bfloat16() -> None:
    queries, keys = (torch.randn(1, 2, 4, 8, dtype=torch.bfloat16) for _ in range(2))
    deciders = torch.ones(1, 4, dtype=torch.bool)
    assert visual_scores("decider", queries, keys, deciders, torch.arange(4)).dtype == torch.float32


TIED = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 2.0], [1.0, 1.0]]])


def test_near_ties_are_the_calls_that_float32_does_not_decide() -> None:
    kept = torch.tensor([[0, 1]])
    assert near_ties(TIED, kept, layer=3) == [NearTie(3, 0, 4, 1, 0.0)]  # as far from both; token 2 is 0.8 and 0.6 away
    assert near_ties(TIED, torch.tensor([[0]]), layer=3) == []  # one kept token leaves no choice
    twins = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]])
    assert near_ties(twins, torch.tensor([[0, 1]]), layer=0) == [NearTie(0, 0, 2, 1, 0.0)]


def test_a_turned_near_tie_joins_its_second_choice_and_nothing_else_moves() -> None:
    kept = torch.tensor([[0, 1]])
    assert nearest_kept(TIED, kept).tolist() == [[0, 1, 1, 1, 0]]
    assert nearest_kept(TIED, kept, turned=[NearTie(3, 0, 4, 1, 0.0)]).tolist() == [[0, 1, 1, 1, 1]]


@pytest.mark.parametrize("zeros", [False, True], ids=["five different rows", "zeros"])
def test_of_many_that_tie_a_turned_token_joins_another_of_them(zeros: bool) -> None:
    """Identical kept tokens: any two of those that tie may come first, whichever way they are looked for."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.zeros(1, 8) if zeros else torch.randn(5, 8, generator=generator)
        normed = rows[torch.randint(len(rows), (1, 40), generator=generator)]
        kept = torch.randperm(40, generator=generator)[:12].sort().values[None]
        nearest = nearest_kept(normed, kept)
        for tie in near_ties(normed, kept, layer=0):
            assert tie.token not in kept
            assert 0 <= tie.other < 12
            assert tie.other != nearest[0, tie.token]
            turned = nearest_kept(normed, kept, turned=[tie])
            assert (turned != nearest).nonzero().tolist() == [[0, tie.token]]
            assert torch.equal(normed[0, kept[0, tie.other]], normed[0, kept[0, nearest[0, tie.token]]])


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(8, 70), st.booleans())
@settings(deadline=None, max_examples=60)
def test_ties_between_identical_kept_tokens_go_to_the_lower_index(
    seed: int, visual: int, width: int, limited: bool
) -> None:
    """However a product of matrices rounds: its kernels treat the last columns otherwise than the first."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(3, width, generator=generator)
    kind = torch.randint(3, (2, visual), generator=generator)
    keep = int(torch.randint(1, visual + 1, (), generator=generator))
    kept = torch.stack([torch.randperm(visual, generator=generator)[:keep].sort().values for _ in range(2)])
    targets = torch.rand(2, keep, generator=generator) < 0.5 if limited else torch.ones(2, keep, dtype=torch.bool)
    targets[:, -1] = True
    nearest = nearest_kept(kinds[kind], kept, targets if limited else None)
    for row in range(2):
        for token in set(range(visual)) - set(kept[row].tolist()):
            twins = (kind[row, kept[row]] == kind[row, token]) & targets[row]
            if twins.any():
                assert nearest[row, token] == int(twins.nonzero()[0])


def test_targets_limit_who_takes_others_in() -> None:
    only_first = torch.tensor([[True, False]])
    assert nearest_kept(TIED, torch.tensor([[0, 1]]), only_first).tolist() == [[0, 1, 0, 0, 0]]


def test_a_near_tie_is_told_by_the_rows_and_not_by_how_float32_adds_up() -> None:
    """Tokens half-way between two kept ones: float32's difference of the two similarities is noise of up to 5e-7."""
    generator = torch.Generator().manual_seed(0)
    between = 400
    ends = F.normalize(1 + 0.5 * torch.randn(1, 2 * between, 512, generator=generator, dtype=torch.float64), dim=-1)
    middle = ends[:, :between] + ends[:, between:]
    normed = torch.cat([ends, middle], dim=1).float() * 20
    kept = torch.arange(2 * between)[None]
    tied = near_ties(normed, kept, layer=0, within=2e-8)
    assert {call.token for call in tied} == set(range(2 * between, 3 * between))
