"""Choosing tokens and committing positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.config import Certainty, Choices, GenerationConfig
from d3tom_export.loop import sampling
from d3tom_export.loop.sampling import (
    Choice,
    Race,
    RowNoise,
    certainty_of,
    certainty_of_logits,
    choose,
    commit,
    sample_tokens,
    softmax64,
    without_banned,
)


def _logits(seed: int = 0, rows: int = 1, vocabulary: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 6, vocabulary)).astype(np.float32) * 3


def _greedy(logits: np.ndarray, vocab_rows: int | None = None) -> Choice:
    token = logits[..., :vocab_rows].argmax(-1)
    return Choice(token, np.take_along_axis(softmax64(logits), token[..., None], -1)[..., 0])


def _choose(logits: np.ndarray, vocab_rows: int | None = None, **settings: object) -> Choice:
    generation = GenerationConfig(gen_length=logits.shape[1], **settings)  # type: ignore[arg-type]
    asked = generation.certainty
    certainty = None if asked is None else certainty_of_logits(asked, logits)
    noise = RowNoise(range(generation.seed, generation.seed + len(logits)), 0)
    choices = None if vocab_rows is None else Choices(vocab_rows)
    return choose(_greedy(logits, vocab_rows), certainty, logits, generation, noise, choices)


def test_low_confidence_is_the_probability_of_the_likeliest_token() -> None:
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


def test_certainty_follows_from_the_largest_probability_and_what_the_others_are() -> None:
    """What stage `certainty` says, in float64: the same numbers as from the logits, between which nothing is lost."""
    logits = np.concatenate([_logits(), 8 * _logits(1), 1e-3 * _logits(2)])
    p = np.sort(softmax64(logits), axis=-1)[..., ::-1]
    rest = p[..., 1:].sum(-1) / p[..., 0]
    rest_entropy = -(p[..., 1:] * np.log(p[..., 1:] + 1e-10)).sum(-1)
    for kind, other in (("margin", p[..., 1] / p[..., 0]), ("entropy", rest_entropy)):
        certainty = Certainty(kind)  # type: ignore[arg-type]
        found = certainty_of(certainty, rest, other)
        np.testing.assert_allclose(found, certainty_of_logits(certainty, logits), rtol=1e-9, atol=1e-15)


def test_random_remasking_ignores_the_logits_but_not_the_seed() -> None:
    first = _choose(_logits(0), remasking="random").confidence
    assert np.array_equal(first, _choose(_logits(1), remasking="random").confidence)
    assert not np.array_equal(first, _choose(_logits(0), remasking="random", seed=1).confidence)


def test_confidence_under_temperature_is_of_the_sampled_token_without_noise() -> None:
    logits = _logits()
    choice = _choose(logits, temperature=2.0, seed=3)
    assert not np.array_equal(choice.token, logits.argmax(-1))
    p = np.take_along_axis(softmax64(logits), choice.token[..., None], -1)[..., 0]
    np.testing.assert_allclose(choice.confidence, p, rtol=1e-12)


def test_a_seed_draws_the_same_tokens_again_and_another_seed_others() -> None:
    logits = _logits(vocabulary=5000)
    assert np.array_equal(_choose(logits, temperature=1.5).token, _choose(logits, temperature=1.5).token)
    assert not np.array_equal(_choose(logits, temperature=1.5).token, _choose(logits, temperature=1.5, seed=1).token)


def _drawn(logits: np.ndarray, temperature: float, count: int) -> np.ndarray:
    """How often each column is drawn in ``count`` draws from one position's logits."""
    many = np.broadcast_to(logits, (1, count, len(logits)))
    tokens = sample_tokens(many, np.full((1, count), logits.argmax()), temperature, RowNoise([0], 0))
    return np.bincount(tokens[0], minlength=len(logits))


@pytest.mark.parametrize("racers", [1, 1024], ids=["one racer", "all of them"])
@pytest.mark.parametrize("temperature", [0.3, 3.0])
def test_sampling_draws_in_proportion_to_the_softmax(
    monkeypatch: pytest.MonkeyPatch, racers: int, temperature: float
) -> None:
    """Whichever columns have their noise drawn, and whichever have it from the hash."""
    monkeypatch.setattr(sampling, "_RACERS", racers)
    logits = np.log(np.array([0.05, 0.35, 0.02, 0.3, 0.2, 0.08])).astype(np.float32)
    count = 3000
    expected = count * softmax64(logits / temperature)
    statistic = ((_drawn(logits, temperature, count) - expected) ** 2 / np.maximum(expected, 1e-9))[expected > 1].sum()
    assert statistic < 27.9  # of chi-square with 5 degrees of freedom, in 4 of 100,000 samples is more
    assert _drawn(logits, temperature, 200)[expected < 1e-3].sum() == 0


@pytest.mark.parametrize("columns", [1, 7, 300])
def test_noise_is_exponential_in_every_column_drawn_or_not(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_RACERS", 5)
    generator, every = np.random.default_rng(3), np.arange(columns)
    noise = np.array([Race(generator, columns).of(every) for _ in range(12_000 // columns)])
    shares = np.sort(np.exp(-noise).ravel())  # uniform, if the noise is exponential
    largest_gap = np.abs(shares - (np.arange(shares.size) + 0.5) / shares.size).max()
    assert largest_gap < 2.2 / np.sqrt(shares.size)  # Kolmogorov-Smirnov; more in 1 of 10,000 samples
    if columns > 1:
        assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 4 / np.sqrt(len(noise))


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 5.0])
def test_no_column_that_was_passed_over_would_have_won(scale: float, temperature: float) -> None:
    """Against the noise of all columns, worked out."""
    logits = np.random.default_rng(1).normal(size=(1, 8, 20_000)).astype(np.float32) * scale
    tokens = sample_tokens(logits, logits.argmax(-1), temperature, RowNoise([5], 0), 19_000)
    (races,) = RowNoise([5], 0).races(8, 20_000)
    for place, race in enumerate(races):
        scores = logits[0, place, :19_000].astype(np.float64) - temperature * np.log(race.of(np.arange(19_000)))
        assert tokens[0, place] == scores.argmax()


def test_noise_of_a_row_does_not_depend_on_the_batch() -> None:
    batched, races = RowNoise([5, 6, 7], 0).uniform(4, 2), RowNoise([5, 6, 7], 0).races(2, 50)
    for row in range(3):
        assert np.array_equal(RowNoise([5 + row], 0).uniform(4, 2)[0], batched[row])
        (alone,) = RowNoise([5 + row], 0).races(2, 50)
        for mine, other in zip(alone, races[row], strict=True):
            assert np.array_equal(mine.of(np.arange(50)), other.of(np.arange(50)))


@given(st.data())
def test_commit_takes_the_most_confident_eligible_and_breaks_ties_low(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 20))
    confidence = np.array([data.draw(st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=length, max_size=length))])
    eligible = np.array([data.draw(st.lists(st.booleans(), min_size=length, max_size=length))])
    count = data.draw(st.integers(0, length))
    transfer = commit(confidence, eligible, np.array([count]))
    ranked = sorted(np.flatnonzero(eligible[0]), key=lambda i: (-confidence[0, i], i))
    assert np.flatnonzero(transfer[0]).tolist() == sorted(ranked[:count])


@pytest.mark.parametrize(
    "settings",
    [{}, {"remasking": "margin"}, {"remasking": "entropy"}, {"temperature": 0.7}, {"temperature": 1e-9}],
)
def test_rows_without_a_token_count_and_are_never_chosen(settings: dict) -> None:
    """Columns 7 to 10 belong to padding rows of the head; at some positions one of them is the largest."""
    logits = _logits(5)
    choice, whole = _choose(logits, 7, **settings), _choose(logits, **settings)
    assert (whole.token >= 7).any()
    assert (choice.token < 7).all()
    assert np.array_equal(choice.token[whole.token < 7], whole.token[whole.token < 7])
    if "remasking" not in settings:
        p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
        expected = np.take_along_axis(p, choice.token[..., None], -1)[..., 0]
        np.testing.assert_allclose(choice.confidence, expected, rtol=1e-12)
    else:
        assert np.array_equal(choice.confidence, whole.confidence)


def _drawn_from(logits: np.ndarray, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Probabilities (R,) after Dream's filters, one position, stated plainly in float32 (spec-lavida-dream.md, 6)."""
    order = np.argsort(-logits, kind="stable")
    left = list(order)
    if top_p is not None:
        p = np.exp(logits[order] - logits.max())
        passed = np.cumsum(p / p.sum()) > top_p
        left = [column for place, column in enumerate(order) if place == 0 or not passed[place - 1]]
    if top_k is not None:
        left = [column for column in left if logits[column] >= logits[order][min(top_k, len(order)) - 1]]
    p = np.zeros_like(logits)
    p[left] = np.exp(logits[left] - logits.max())
    return p / p.sum()


@pytest.mark.parametrize("kind", ["probability", "margin", "entropy"])
@given(top_k=st.none() | st.integers(1, 40), top_p=st.none() | st.floats(0.05, 0.99), seed=st.integers(0, 99))
def test_certainty_among_the_likeliest(kind: str, top_k: int | None, top_p: float | None, seed: int) -> None:
    logits = _logits(seed, vocabulary=30)
    certainty = Certainty(kind, top_k, top_p, single=True)  # type: ignore[arg-type]
    found = certainty_of_logits(certainty, logits)
    for place, row in enumerate(logits[0]):
        p = _drawn_from(row, top_k, top_p)
        one, two = np.sort(p)[::-1][:2]
        expected = {"probability": one, "margin": one - two, "entropy": (p * np.log(p + np.float32(1e-10))).sum()}
        np.testing.assert_allclose(found[0, place], expected[kind], atol=2e-6)


def test_dreams_certainties_tie_where_float32_does() -> None:
    logits = np.zeros((1, 2, 5), np.float32)
    logits[0, :, 0] = (30.0, 40.0)
    for kind in ("probability", "margin"):
        single, exact = (certainty_of_logits(Certainty(kind, single=each), logits)[0] for each in (True, False))  # type: ignore[arg-type]
        assert single[0] == single[1] == 1.0
        assert exact[0] < exact[1]


def test_drawing_is_from_what_the_filters_leave() -> None:
    logits = _logits(2, vocabulary=30)
    settings = {"temperature": 2.0, "rank_drawn": True, "remasking": "margin"}
    drawn = {tuple(_choose(logits, seed=seed, top_k=3, **settings).token[0]) for seed in range(40)}
    likeliest = np.argsort(-logits[0], axis=-1)[:, :3]
    assert len(drawn) > 5
    assert all(token in likeliest[place] for tokens in drawn for place, token in enumerate(tokens))
    narrow = _choose(logits, top_p=1e-6, **settings)
    assert np.array_equal(narrow.token, logits.argmax(-1))
    assert (narrow.confidence == 1).all()


def test_banned_tokens_are_neither_chosen_nor_counted() -> None:
    logits = _logits(1)
    banned = tuple(np.unique(logits.argmax(-1)).tolist())
    allowed = without_banned(logits, Choices(11, banned))
    assert np.isneginf(allowed[..., list(banned)]).all()
    assert np.isfinite(logits).all()
    generation = GenerationConfig(gen_length=6, temperature=1.5)
    choice = choose(_greedy(allowed), None, logits, generation, RowNoise([0], 0), Choices(11, banned))
    assert not np.isin(choice.token, banned).any()
    p = softmax64(np.delete(logits, banned, axis=-1))
    np.testing.assert_allclose(np.sort(p.max(-1)), np.sort(_greedy(allowed).confidence), rtol=1e-9)
