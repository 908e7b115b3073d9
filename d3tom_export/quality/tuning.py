"""The cheapest setting that keeps a floor of quality, or the best within a budget: searched, then checked elsewhere.

Questions are split once, in a seeded order. On the one part candidates are halved round by round
(:mod:`d3tom_export.quality.search`); the choice is checked on the other, which it was not searched on, and where it
does not hold there the next safer one is tried, or of a budget the next best. Imports NumPy alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from d3tom_export.errors import D3tomError
from d3tom_export.pipeline import Reader
from d3tom_export.progress import Progress, no_progress
from d3tom_export.quality.answering import Runtime, answer_all, warm_up
from d3tom_export.quality.dataset import DataSet, Item, groups_of
from d3tom_export.quality.intervals import LEVEL, Comparison, Interval, compare, mean_interval
from d3tom_export.quality.report import scores_of
from d3tom_export.quality.results import Results
from d3tom_export.quality.scoring import Metric, Scoring
from d3tom_export.quality.search import better_half, rounds, split
from d3tom_export.quality.settings import Setting

CostKind = Literal["flops", "time"]
"""FLOPs of an answer's matrix products, on average, or its seconds, the median."""

_DRAWS = 2000
"""Of the bootstrap, for each candidate of each round."""


@dataclass(frozen=True)
class Goal:
    """Either a floor or a budget."""

    min_retention: float | None
    """The least score over the reference's."""
    max_cost: float | None
    """The most that an answer may cost, in FLOPs or seconds."""
    cost: CostKind = "flops"
    proven: bool = False
    """Whether a floor holds only where the lowest retention keeps it (95 %, one-sided, all checks together), not the
    estimate alone."""


@dataclass(frozen=True)
class Asked:
    """A setting as so many questions found it, against the reference on the same ones."""

    setting: Setting
    questions: int
    cost: float
    score: float
    """Mean, 0 to 1."""
    mean_kept: float
    steps: float
    comparison: Comparison

    cost_interval: Interval
    """Of the mean cost."""

    @property
    def retention(self) -> float:
        """0 where the reference scores nothing."""
        return self.comparison.retention or 0.0

    @property
    def lowest(self) -> float:
        """What retention is at least, one-sided, at the level that was asked for; 0 where the reference scores nothing.

        Of the reference itself what questions of which none changes bear out at most.
        """
        return self.comparison.lowest or 0.0


@dataclass(frozen=True)
class Round:
    """What one round left."""

    questions: int
    candidates: int
    """That were asked."""
    dropped: int
    """That cannot be wanted: all of retention's interval below the floor, or over the budget."""


@dataclass
class Outcome:
    """What a search found."""

    reference: Asked
    """On all the questions that were searched on."""
    reference_check: Asked | None
    finalists: list[Asked]
    """Cheapest first, asked all the questions that were searched on."""
    others: list[Asked]
    """Candidates that were left behind, as last asked."""
    rounds: list[Round] = field(default_factory=list)
    checks: list[Asked] = field(default_factory=list)
    """What was tried on the other questions, in order."""
    check_level: float = LEVEL
    """Of the lowest retention of each of them: the level of all, split over those that might have been tried."""
    chosen: Asked | None = None
    """The last of ``checks``, where it held."""


@dataclass(frozen=True)
class Tuning:
    """A search over settings, the first of which is the reference that retention is measured against."""

    runtime: Runtime
    reader: Reader
    data: DataSet
    settings: Sequence[Setting]
    results: Results
    scoring: Scoring
    metric: Metric
    goal: Goal
    seed: int = 0

    def run(self, items: Sequence[Item], check_share: float, progress: Progress = no_progress) -> Outcome:
        """Search on one part of ``items``, check on the other. Raises :class:`D3tomError` where there are too few."""
        if len(items) < 4:
            raise D3tomError(
                f"{len(items)} questions cannot be split to search and to check on: at least 4 are needed. Give more "
                "with --data or --samples."
            )
        to_search, to_check = split(len(items), self.seed, check_share, groups_of(items))
        outcome = self._search([items[at] for at in to_search], progress)
        held_out = [items[at] for at in to_check]
        ordered = self._in_order(outcome)
        outcome.check_level = LEVEL / max(len(ordered), 1)
        for finalist in ordered:
            self._answer(held_out, [self.settings[0], finalist.setting], progress)
            if outcome.reference_check is None:
                outcome.reference_check = self._asked(self.settings[0], held_out, outcome.check_level)
            found = self._asked(finalist.setting, held_out, outcome.check_level)
            outcome.checks.append(found)
            if self.holds(found):
                outcome.chosen = found
                break
        return outcome

    def _answer(self, items: Sequence[Item], settings: Sequence[Setting], progress: Progress) -> None:
        each_once = list(dict.fromkeys(settings))
        answer_all(self.runtime, self.reader, self.data, items, each_once, self.results, progress)

    def _asked(self, setting: Setting, items: Sequence[Item], level: float = LEVEL) -> Asked:
        given = [self.results.get(setting, item) for item in items]
        reference, scores = (
            scores_of(each, items, self.results, self.scoring, self.metric) for each in (self.settings[0], setting)
        )
        steps, groups = sum(each.steps for each in given), groups_of(items)
        timed = self.goal.cost == "time"
        costs = [each.seconds if timed else each.flops for each in given]
        return Asked(
            setting,
            len(items),
            statistics.median(costs) if timed else statistics.mean(costs),
            float(scores.mean()),
            sum(each.mean_kept * each.steps for each in given) / steps,
            steps / len(given),
            compare(reference, scores, self.seed, _DRAWS, groups, level),
            mean_interval(np.array(costs, dtype=np.float64), self.seed, _DRAWS, groups),
        )

    def _search(self, items: Sequence[Item], progress: Progress) -> Outcome:
        # Within a budget unmerged answers of the first loop may be the best; nothing is cheaper than itself.
        left = list(self.settings[0 if self.goal.min_retention is None else 1 :])
        behind: dict[Setting, Asked] = {}
        history: list[Round] = []
        finalists: list[Asked] = []
        plan = rounds(len(left), len(items))
        if self.goal.cost == "time":
            self._warm_up(items[: plan[0]])
        for number, count in enumerate(plan, 1):
            self._answer(items[:count], [self.settings[0], *left], progress)
            asked = [self._asked(setting, items[:count]) for setting in left]
            wanted = [each for each in asked if not self._hopeless(each)]
            history.append(Round(count, len(asked), len(asked) - len(wanted)))
            finalists = wanted
            if number < len(plan) and wanted:
                finalists = better_half(wanted, [(each.cost, each.score) for each in wanted])
            left = [each.setting for each in finalists]
            behind |= {each.setting: each for each in asked if each.setting not in left}
        if not finalists:  # every round that was to come
            self._answer(items, [self.settings[0]], progress)
        reference = self._asked(self.settings[0], items)
        ordered = sorted(finalists, key=lambda each: each.cost)
        return Outcome(reference, None, ordered, list(behind.values()), history)

    def _warm_up(self, items: Sequence[Item]) -> None:
        """Answer one question in each loop before time counts, unless nothing of ``items`` is left to be answered."""
        if any(not self.results.has(setting, item) for setting in self.settings for item in items):
            firsts = {setting.loop: setting for setting in reversed(self.settings)}
            warm_up(self.runtime, self.reader, self.data, items[0], list(firsts.values()))

    def _hopeless(self, asked: Asked) -> bool:
        goal, interval = self.goal, asked.comparison.retention_interval
        if goal.max_cost is not None:
            # Few questions may be dear ones: the interval has to be above, too.
            return min(asked.cost, asked.cost_interval.low) > goal.max_cost
        assert goal.min_retention is not None
        return interval is not None and interval.high < goal.min_retention and asked.comparison.p < 0.05

    def _in_order(self, outcome: Outcome) -> list[Asked]:
        """Finalists that are worth a check: of a floor the cheapest first, then safer ones; of a budget the best.

        Safer is what costs more and scored no worse on the questions that were searched on.
        """
        goal = self.goal
        if goal.max_cost is not None:
            affordable = [each for each in outcome.finalists if each.cost <= goal.max_cost]
            return sorted(affordable, key=lambda each: (-each.score, each.cost))
        assert goal.min_retention is not None
        cheaper = [each for each in outcome.finalists if each.cost < outcome.reference.cost]
        found: list[Asked] = []
        for each in sorted(cheaper, key=lambda each: (each.cost, -each.score)):
            if each.retention >= goal.min_retention and (not found or each.score >= found[-1].score):
                found.append(each)
        return found

    def holds(self, checked: Asked) -> bool:
        """Whether a setting keeps the goal on questions that it was not searched on."""
        goal = self.goal
        if goal.max_cost is not None:
            return checked.cost <= goal.max_cost
        assert goal.min_retention is not None
        judged = checked.lowest if goal.proven else checked.retention
        return judged >= goal.min_retention
