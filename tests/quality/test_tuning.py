"""The search for a setting, on answers whose scores and costs are known: nothing is run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.quality.dataset import DataSet, Item
from d3tom_export.quality.results import Answered, Binding, Results
from d3tom_export.quality.scoring import Scoring
from d3tom_export.quality.search import split
from d3tom_export.quality.settings import Setting
from d3tom_export.quality.tuning import Goal, Outcome, Tuning

GENERATION = GenerationConfig(gen_length=8)
REFERENCE = Setting.of("uncached", None, GENERATION)
QUESTIONS = 80


def _setting(ratio: float) -> Setting:
    return Setting.of("uncached", MergeConfig(layer=1, ratio=ratio, schedule="fixed"), GENERATION)


def _never(setting: Setting) -> Any:
    raise AssertionError(f"{setting.label} was answered already")


Wrong = dict[float, set[int]]
"""By ratio, the questions that a setting gets wrong. It costs as many FLOPs as it keeps."""


def _tuning(
    wrong: Wrong,
    goal: Goal,
    seed: int = 0,
    reference_wrong: set[int] = frozenset(),  # type: ignore[assignment]
    a_picture: int | None = None,
) -> Tuning:
    """With ``a_picture`` questions about each picture; without, of none."""
    shown = [() if a_picture is None else (f"{at // a_picture}.png",) for at in range(QUESTIONS)]
    items = [Item(at, str(at), "?", ("right",), "", shown[at]) for at in range(QUESTIONS)]
    data = DataSet("made up", items, "", lambda name: b"")
    results = Results(None, Binding("", "", "", "", "", ""))
    settings = {REFERENCE: reference_wrong, **{_setting(ratio): missed for ratio, missed in wrong.items()}}
    for item in items:
        results.know(item, data.key(item, data.contents(item)))
        for setting, missed in settings.items():
            ratio = setting.merge.ratio if setting.merge else 0.0
            text = "wrong" if item.index in missed else "right"
            keep = round(100 * (1 - ratio))
            results.add(setting, Answered(setting.id, item.index, text, 1, (keep,), 120, 100, 1000 * keep, keep / 100))
    return Tuning(_never, None, data, list(settings), results, Scoring(), "exact-match", goal, seed)  # type: ignore[arg-type]


def _run(tuning: Tuning) -> Outcome:
    return tuning.run(tuning.data.items, 0.5)


def _searched(seed: int = 0) -> tuple[list[int], list[int]]:
    return split(QUESTIONS, seed, 0.5)


def _ratio(outcome: Outcome) -> float | None:
    chosen = outcome.chosen
    return None if chosen is None else chosen.setting.merge.ratio  # type: ignore[union-attr]


def test_the_cheapest_that_keeps_the_floor() -> None:
    """Wrong about a growing share of both parts: 0.7 keeps 95 %, 0.9 does not."""
    wrong = {ratio: set(range(0, QUESTIONS, step)) for ratio, step in ((0.9, 4), (0.7, 80), (0.5, 1000), (0.3, 1000))}
    outcome = _run(_tuning(wrong, Goal(0.95, None)))
    assert _ratio(outcome) == 0.7
    assert [each.setting.merge.ratio for each in outcome.finalists] == [0.7, 0.5, 0.3]  # type: ignore[union-attr]
    assert outcome.rounds[0].dropped == 1  # the interval of 0.9 is below the floor
    assert len(outcome.checks) == 1
    assert outcome.checks[0].questions == outcome.reference.questions == 40
    assert outcome.reference.cost > outcome.chosen.cost  # type: ignore[union-attr]


def test_a_choice_that_fails_its_check_gives_way_to_a_safer_one() -> None:
    search, check = _searched()
    wrong = {0.9: set(check[:20]), 0.7: set(check[:6]) | set(search[:1]), 0.5: set()}
    # 0.9 looks perfect where it is searched on, and is wrong about half of the rest.
    outcome = _run(_tuning(wrong, Goal(0.95, None)))
    assert [each.setting.merge.ratio for each in outcome.checks] == [0.9, 0.5]  # type: ignore[union-attr]
    assert _ratio(outcome) == 0.5


def test_where_nothing_keeps_the_floor_nothing_is_chosen() -> None:
    everything = set(range(QUESTIONS))
    outcome = _run(_tuning({0.9: everything, 0.5: everything}, Goal(0.9, None)))
    assert outcome.chosen is None
    assert not outcome.checks
    assert not outcome.finalists  # all of their intervals is below
    assert outcome.rounds[-1].dropped == 2
    _, check = _searched()
    held = _run(_tuning({0.9: set(check)}, Goal(0.9, None)))
    assert (held.chosen, len(held.checks)) == (None, 1)


def test_proof_takes_more_than_the_estimate() -> None:
    wrong = {0.9: set[int](), 0.5: set[int]()}
    assert _ratio(_run(_tuning(wrong, Goal(0.99, None)))) == 0.9
    proven = _run(_tuning(wrong, Goal(0.99, None, proven=True)))
    assert proven.chosen is None  # forty questions without a change bear out no more than 0.907, of two checks
    assert proven.check_level == 0.025
    assert proven.checks[0].lowest == pytest.approx(0.02 ** (1 / 40))
    assert proven.reference_check is not None
    assert proven.reference_check.lowest == proven.checks[0].lowest  # what can be proven at most
    assert _ratio(_run(_tuning(wrong, Goal(0.91, None, proven=True)))) is None
    assert _ratio(_run(_tuning(wrong, Goal(0.90, None, proven=True)))) == 0.9
    alone = _run(_tuning({0.9: set()}, Goal(0.92, None, proven=True)))
    assert alone.checks[0].lowest == pytest.approx(0.04 ** (1 / 40))


def test_an_answer_worse_proves_less() -> None:
    """A floor that forty unchanged answers just prove is not proven with one of them wrong."""
    _, check = _searched()
    floor = 0.04 ** (1 / 40) - 1e-6
    assert _ratio(_run(_tuning({0.9: set()}, Goal(floor, None, proven=True)))) == 0.9
    found = _run(_tuning({0.9: {check[0]}}, Goal(floor, None, proven=True)))
    assert found.chosen is None
    assert found.checks[0].lowest < floor - 0.02


def test_the_best_within_a_budget() -> None:
    wrong = {0.9: set(range(0, QUESTIONS, 3)), 0.7: set(range(0, QUESTIONS, 10)), 0.3: set[int]()}
    assert _ratio(_run(_tuning(wrong, Goal(None, 35_000)))) == 0.7
    assert _ratio(_run(_tuning(wrong, Goal(None, 75_000)))) == 0.3
    assert _ratio(_run(_tuning(wrong, Goal(None, 0.15, "time")))) == 0.9
    unmerged = _run(_tuning(wrong | {0.3: {1, 2, 3}}, Goal(None, 200_000)))
    assert unmerged.chosen is not None
    assert unmerged.chosen.setting == REFERENCE  # within the budget, and the best
    assert len(unmerged.rounds) == 1
    assert unmerged.rounds[0].candidates == 4
    none = _run(_tuning(wrong, Goal(None, 5_000)))
    assert (none.chosen, none.finalists) == (None, [])


def test_many_candidates_are_halved() -> None:
    """Forty ratios; those above 0.6 are wrong about more and more. Few of all questions are asked."""
    ratios = [round(0.1 + 0.02 * number, 2) for number in range(40)]
    wrong = {ratio: set(range(int(max(0.0, ratio - 0.6) * 2 * QUESTIONS))) for ratio in ratios}
    for seed in range(3):
        outcome = _run(_tuning(wrong, Goal(0.95, None), seed))
        chosen = _ratio(outcome)
        assert chosen is not None
        assert 0.3 <= chosen <= 0.66, chosen
        assert [each.candidates for each in outcome.rounds][:2] == [40, 20]
        asked = sum(each.candidates * each.questions for each in outcome.rounds)
        assert asked < 0.6 * 40 * 40
        kept = outcome.reference.score * 0.95
        assert outcome.chosen is not None
        assert outcome.chosen.score >= kept


def test_a_reference_that_is_never_right_keeps_nothing() -> None:
    outcome = _run(_tuning({0.5: set()}, Goal(0.9, None), reference_wrong=set(range(QUESTIONS))))
    assert outcome.chosen is None
    assert outcome.finalists[0].retention == 0.0
    assert outcome.finalists[0].lowest == 0.0


def test_too_few_questions_are_refused() -> None:
    tuning = _tuning({0.5: set()}, Goal(0.9, None))
    with pytest.raises(D3tomError, match="at least 4 are needed"):
        tuning.run(tuning.data.items[:3], 0.5)
    assert replace(tuning, seed=3).run(tuning.data.items[:4], 0.5).reference.questions == 2


def test_a_fallback_is_no_worse_where_it_was_searched() -> None:
    """What costs more and scored less is not safer than what has just failed."""
    search, check = _searched()
    wrong = {0.9: set(check), 0.7: set(search[:2]), 0.5: set(check), 0.3: set(search[:1])}
    outcome = _run(_tuning(wrong, Goal(0.9, None)))
    assert [each.setting.merge.ratio for each in outcome.checks] == [0.9, 0.5]  # type: ignore[union-attr]
    assert outcome.chosen is None


def test_a_few_dear_questions_drop_nobody() -> None:
    """A setting over the budget on the first four questions and well below it on the others is asked on."""
    search, _ = _searched()
    ratios = [0.9 - 0.01 * number for number in range(40)]
    tuning = _tuning({ratio: {0, 1, 2, 3, 4} for ratio in ratios[1:]} | {0.9: set()}, Goal(None, 50_000))
    best = next(setting for setting in tuning.settings if setting.merge and setting.merge.ratio == 0.9)
    dear = {search[0], search[1], search[2]}
    for item in tuning.data.items:
        given = tuning.results.get(best, item)
        tuning.results.answers[best.id, item.index] = replace(given, flops=90_000 if item.index in dear else 9_000)
    outcome = _run(tuning)
    assert outcome.rounds[0].questions <= 5
    assert _ratio(outcome) == 0.9


def test_questions_about_one_picture_are_searched_or_checked_on() -> None:
    outcome = _run(_tuning({0.9: set(), 0.5: set()}, Goal(0.9, None, proven=True), a_picture=8))
    assert outcome.checks[0].questions == 40
    # Five pictures' worth of evidence, not forty questions'.
    assert outcome.checks[0].lowest == pytest.approx(0.02 ** (1 / 5))
    assert outcome.chosen is None
