"""Commit rules against statements of them from the papers' facts, written without looking at ours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.config import CommitRule, GenerationConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.commit_rules import commit_by_rule, decide, rule_slack

CONFIDENCES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12)
RULES: tuple[CommitRule, ...] = ("threshold", "factor", "frechet")


def _settings(rule: CommitRule, **changes: float) -> GenerationConfig:
    return GenerationConfig(12, commit=rule, **changes)  # type: ignore[arg-type]


def _count(generation: GenerationConfig, confidences: list[float]) -> int:
    """How many of one row's confidences are committed."""
    row = np.array([confidences])
    committed = commit_by_rule(generation, row, np.ones_like(row, dtype=np.bool_)).transfer[0]
    # Whatever the rule, they are the surest ones.
    if not committed.all():
        assert row[0][committed].min() >= row[0][~committed].max()
    return int(committed.sum())


def _threshold(confidences: list[float], threshold: float) -> int:
    """Fast-dLLM: everything that reaches the threshold, and the surest in any case."""
    return max(1, sum(confidence >= threshold for confidence in confidences))


def _factor(confidences: list[float], factor: float) -> int:
    """Fast-dLLM's dynamic rule, walked as its code walks: n tokens need 1 - f/(n+1), and the last falls in."""
    ranked = sorted(confidences, reverse=True)
    failing = 0
    for failing in range(len(ranked)):
        if failing > 0 and ranked[failing] < 1 - factor / (failing + 2):
            break
    return len(ranked) if failing == len(ranked) - 1 else failing


def _frechet(confidences: list[float], margin: float) -> int:
    """Fast-dLLM++: the largest n whose lower bound of all right is above the upper bound of the last wrong."""
    ranked = sorted(confidences, reverse=True)
    lower = [sum(ranked[:n]) - (n - 1) for n in range(1, len(ranked) + 1)]
    upper = [1 - ranked[n - 1] for n in range(1, len(ranked) + 1)]
    return max([1, *(n for n in range(1, len(ranked) + 1) if lower[n - 1] - upper[n - 1] > margin)])


STATEMENTS: dict[CommitRule, tuple[str, Callable[[list[float], float], int]]] = {
    "threshold": ("threshold", _threshold),
    "factor": ("factor", _factor),
    "frechet": ("margin", _frechet),
}


@pytest.mark.parametrize("rule", RULES)
@given(confidences=CONFIDENCES, parameter=st.floats(0.01, 0.99))
def test_each_rule_is_what_its_source_says(rule: CommitRule, confidences: list[float], parameter: float) -> None:
    name, statement = STATEMENTS[rule]
    slack = rule_slack(_settings(rule, **{name: parameter}), np.sort(np.array(confidences))[::-1])
    if np.abs(slack).min() < 1e-12:  # which way such a one goes, the order of a sum decides
        return
    assert _count(_settings(rule, **{name: parameter}), confidences) == statement(confidences, parameter)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("confidences", "expected"),
    [([0.3], 1), ([0.97] * 4, 4), ([0.1] * 4, 1), ([1.0] * 6, 6)],
    ids=["one mask left, unsure", "all sure", "none sure", "certain"],
)
def test_edges(rule: CommitRule, confidences: list[float], expected: int) -> None:
    assert _count(_settings(rule), confidences) == expected


def test_a_confidence_at_the_threshold_is_committed() -> None:
    assert _count(_settings("threshold", threshold=0.75), [0.75, 0.75, 0.5]) == 2


def test_factors_last_one_falls_in_with_the_one_before_it() -> None:
    # 1 - 1/3 for the second, 1 - 1/4 for the third: the walk ends at the last, so all are taken, as released.
    assert _count(_settings("factor"), [0.9, 0.7, 0.1]) == 3
    assert _count(_settings("factor"), [0.9, 0.1]) == 2
    assert _count(_settings("factor"), [0.9, 0.6, 0.1]) == 1
    assert _count(_settings("factor"), [0.9, 0.7, 0.1, 0.1]) == 2


@given(st.floats(0.0, 1.0), st.integers(3, 12))
def test_frechet_of_equal_confidences_is_factor_one(confidence: float, masks: int) -> None:
    frechet = _count(_settings("frechet"), [confidence] * masks)
    factor = _count(_settings("factor"), [confidence] * masks)
    # But for the one that falls in at the end, and for what rounding decides.
    near = min(abs((n + 1) * (1 - confidence) - 1) for n in range(1, masks + 1)) < 1e-9
    assert near or factor in (frechet, frechet + 1 if frechet + 1 == masks else frechet)


@given(
    st.lists(st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6), min_size=1, max_size=4),
    st.sampled_from(RULES),
    st.data(),
)
def test_rows_are_judged_alone_and_only_by_what_is_eligible(
    rows: list[list[float]], rule: CommitRule, data: st.DataObject
) -> None:
    eligible = np.array(data.draw(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=len(rows),
                                           max_size=len(rows))))  # fmt: skip
    confidence = np.array(rows)
    together = commit_by_rule(_settings(rule), confidence, eligible)
    assert together.slack is not None
    for row in range(len(rows)):
        alone = commit_by_rule(_settings(rule), confidence[[row]], eligible[[row]])
        assert np.array_equal(together.transfer[[row]], alone.transfer)
        others = np.where(eligible[row], confidence[row], 0.99)
        again = commit_by_rule(_settings(rule), others[None], eligible[[row]])
        assert np.array_equal(again.transfer, alone.transfer)
        assert together.transfer[row].any() == eligible[row].any()
    assert not (together.transfer & ~eligible).any()
    assert np.array_equal(np.isnan(together.slack), ~eligible)
    met = together.slack > 0 if rule == "frechet" else together.slack >= 0
    assert np.array_equal(met, together.transfer)  # the slack says what was committed


@pytest.mark.parametrize("rule", RULES)
@given(confidences=CONFIDENCES, nudge=st.sampled_from([-1e-7, 1e-7]))
def test_slack_is_small_where_a_nudge_turns_the_call(rule: CommitRule, confidences: list[float], nudge: float) -> None:
    generation = _settings(rule)
    before, after = (np.clip(np.array([confidences]) + move, 0.0, 1.0) for move in (0.0, nudge))
    every = np.ones_like(before, dtype=np.bool_)
    first, second = (commit_by_rule(generation, values, every) for values in (before, after))
    turned = first.transfer != second.transfer
    assert first.slack is not None
    ranked = np.sort(before[0])[::-1]
    if turned.any() and np.diff(-ranked).min(initial=1.0) > 1e-6:  # not ties that clipping made
        assert np.abs(first.slack[turned]).max() <= 2e-7 * (len(confidences) + 1)


def test_a_plan_commits_what_it_counts_and_has_no_slack() -> None:
    confidence = np.array([[0.1, 0.9, 0.5]])
    committed = decide(GenerationConfig(3), confidence, np.ones((1, 3), dtype=np.bool_), np.array([2]))
    assert committed.transfer.tolist() == [[False, True, True]]
    assert committed.slack is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"commit": "threshold", "threshold": 0.0}, "threshold is 0.0"),
        ({"commit": "threshold", "threshold": 1.5}, "threshold is 1.5"),
        ({"commit": "factor", "factor": 0.0}, "factor is 0.0"),
        ({"commit": "frechet", "margin": 1.0}, "margin is 1.0"),
        ({"commit": "threshold", "max_steps": 0}, "max_steps is 0"),
        ({"commit": "threshold", "remasking": "entropy"}, "compares probabilities"),
        ({"max_steps": 3}, "without a plan"),
        ({"commit": "all"}, "commit rule is 'all'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(D3tomError, match=says):
        GenerationConfig(4, **settings)


def test_changing_the_rule_takes_along_what_goes_with_it() -> None:
    base = GenerationConfig(8, remasking="entropy")
    fast = base.changed(commit="threshold", threshold=0.7, max_steps=3)
    assert (fast.remasking, fast.threshold, fast.max_steps) == ("low_confidence", 0.7, 3)
    assert fast.changed(commit="plan").max_steps is None
    assert fast.changed(threshold=0.5).threshold == 0.5
    with pytest.raises(D3tomError, match="factor is for commit rule factor, and answers here are committed by thresh"):
        fast.changed(factor=2.0)
    with pytest.raises(D3tomError, match="compares probabilities"):
        base.changed(commit="threshold", remasking="entropy")
