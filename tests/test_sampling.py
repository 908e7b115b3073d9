"""Choosing tokens and committing positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.config import GenerationConfig
from d3tom_export.sampling import RowNoise, choose, commit, gumbel_argmax, softmax64


def _logits(seed: int = 0, rows: int = 1, vocabulary: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 6, vocabulary)).astype(np.float32) * 3


def _choose(logits: np.ndarray, **settings: object) -> object:
    generation = GenerationConfig(gen_length=6, **settings)  # type: ignore[arg-type]
    return choose(logits, generation, RowNoise(generation.seed, len(logits), 0))


def test_low_confidence_is_the_probability_of_the_chosen_token() -> None:
    logits = _logits()
    choice = _choose(logits)
    assert np.array_equal(choice.token, logits.argmax(-1))
    assert np.array_equal(choice.confidence, softmax64(logits).max(-1))


def test_margin_and_entropy() -> None:
    logits = _logits()
    p = np.sort(softmax64(logits), axis=-1)
    assert np.array_equal(_choose(logits, remasking="margin").confidence, p[..., -1] - p[..., -2])
    negative_entropy = (p * np.log(p + 1e-10)).sum(-1)
    np.testing.assert_allclose(_choose(logits, remasking="entropy").confidence, negative_entropy, rtol=1e-12)


def test_random_remasking_ignores_the_logits_but_not_the_seed() -> None:
    first = _choose(_logits(0), remasking="random").confidence
    assert np.array_equal(first, _choose(_logits(1), remasking="random").confidence)
    assert not np.array_equal(first, _choose(_logits(0), remasking="random", seed=1).confidence)


def test_confidence_under_temperature_is_of_the_sampled_token_without_noise() -> None:
    logits = _logits()
    choice = _choose(logits, temperature=2.0, seed=3)
    assert not np.array_equal(choice.token, logits.argmax(-1))
    p = np.take_along_axis(softmax64(logits), choice.token[..., None], -1)[..., 0]
    assert np.array_equal(choice.confidence, p)


def test_gumbel_sampling_draws_in_proportion_to_the_softmax() -> None:
    logits = np.tile(np.log(np.array([0.2, 0.5, 0.3])), (20000, 1))
    drawn = gumbel_argmax(logits, 1.0, np.random.default_rng(0).random(logits.shape))
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), [0.2, 0.5, 0.3], atol=0.015)


def test_noise_of_a_row_does_not_depend_on_the_batch() -> None:
    batched = RowNoise(5, 3, 0).uniform(4, 2)
    for row in range(3):
        assert np.array_equal(RowNoise(5 + row, 1, 0).uniform(4, 2)[0], batched[row])


@given(st.data())
def test_commit_takes_the_most_confident_eligible_and_breaks_ties_low(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 20))
    confidence = np.array([data.draw(st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=length, max_size=length))])
    eligible = np.array([data.draw(st.lists(st.booleans(), min_size=length, max_size=length))])
    count = data.draw(st.integers(0, length))
    transfer = commit(confidence, eligible, count)
    ranked = sorted(np.flatnonzero(eligible[0]), key=lambda i: (-confidence[0, i], i))
    assert np.flatnonzero(transfer[0]).tolist() == sorted(ranked[:count])


@pytest.mark.parametrize("gap", [1e-9, 1e-12])
def test_float64_tells_confident_positions_apart(gap: float) -> None:
    logits = np.array([[[30.0, 0.0], [30.0 + np.log1p(gap) + 1, 0.0]]])
    confidence = choose(logits, GenerationConfig(gen_length=2), RowNoise(0, 1, 0)).confidence
    assert confidence[0, 0] != confidence[0, 1]
    assert np.float32(confidence[0, 0]) == np.float32(confidence[0, 1]) == 1.0


@pytest.mark.parametrize("settings", [{}, {"remasking": "margin"}, {"remasking": "entropy"}, {"temperature": 0.7}])
def test_rows_without_a_token_count_and_are_never_chosen(settings: dict) -> None:
    """Columns 7 to 10 belong to padding rows of the head; at some positions one of them is the largest."""
    logits = _logits(5)
    generation = GenerationConfig(gen_length=6, **settings)
    choice = choose(logits, generation, RowNoise(0, 1, 0), 7)
    whole = choose(logits, generation, RowNoise(0, 1, 0))
    assert (whole.token >= 7).any()
    assert (choice.token < 7).all()
    assert np.array_equal(choice.token[whole.token < 7], whole.token[whole.token < 7])
    if generation.remasking == "low_confidence":
        p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
        expected = np.take_along_axis(p, choice.token[..., None], -1)[..., 0]
        np.testing.assert_allclose(choice.confidence, expected, rtol=1e-12)
    else:
        assert np.array_equal(choice.confidence, whole.confidence)
