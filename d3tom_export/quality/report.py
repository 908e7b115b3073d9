"""Answers as rows: one a setting, each compared with the same loop unmerged and with the deciders' selection.

Imports NumPy alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from d3tom_export.cost.bench import share_interval, spread
from d3tom_export.quality.dataset import Item, groups_of
from d3tom_export.quality.intervals import (
    DRAWS,
    Comparison,
    Interval,
    Scores,
    compare,
    effective_count,
    mean_interval,
    seen,
)
from d3tom_export.quality.results import Answered, Results
from d3tom_export.quality.scoring import Metric, Scoring
from d3tom_export.quality.settings import Setting


def scores_of(setting: Setting, items: Sequence[Item], results: Results, scoring: Scoring, metric: Metric) -> Scores:
    """(n,) scores of ``items`` in ``setting``, all of which were answered."""
    texts = (results.get(setting, item).text for item in items)
    return np.array([scoring.score(metric, text, item.answers) for text, item in zip(texts, items, strict=True)])


def rounded(interval: Interval | None) -> list[float | None] | None:
    """As JSON has it: an end that is not known is null."""
    if interval is None:
        return None
    return [round(end, 4) if math.isfinite(end) else None for end in interval]


def comparison_json(comparison: Comparison, against: str, verdict: str) -> dict[str, Any]:
    retention = comparison.retention
    return {
        "against": against,
        "retention": None if retention is None else round(retention, 4),
        "retention_interval": rounded(comparison.retention_interval),
        "difference": round(comparison.difference, 4),
        "difference_interval": rounded(comparison.difference_interval),
        "sign_test_p": float(f"{comparison.p:.3g}"),
        "seen": verdict,
    }


_NOT_COMPARED: dict[str, Any] = dict.fromkeys(
    ("against", "retention", "retention_interval", "difference", "difference_interval", "sign_test_p", "seen")
)


def _references(settings: Sequence[Setting]) -> dict[Setting, Setting]:
    """What each setting is compared with: itself unmerged, or of those that are, the first of all."""
    there = set(settings)
    references = {}
    for setting in settings:
        reference = setting.unmerged if setting.merge is not None else settings[0]
        if reference != setting and reference in there:
            references[setting] = reference
    return references


def _deciders(settings: Sequence[Setting]) -> dict[Setting, Setting]:
    """Of those that others select for, the same with the deciders selecting, where that is there: the first, where it
    is there in several ways that others do not look at."""
    others = {setting.merge.select for setting in settings if setting.merge is not None} - {"decider"}
    there: dict[Setting, Setting] = {}
    for setting in settings:
        if setting.merge is not None and setting.merge.select == "decider":
            for select in others:
                merge = replace(setting.merge, select=select)
                there.setdefault(Setting.of(setting.loop, merge, setting.generation), setting)
    return {setting: there[setting] for setting in settings if setting in there}


def keep_equally(one: Sequence[Answered], other: Sequence[Answered]) -> bool:
    """Whether two settings kept as many visual tokens at every step that both ran, question by question."""
    return all(
        all(mine == theirs for mine, theirs in zip(each.kept, against.kept, strict=False))
        for each, against in zip(one, other, strict=True)
    )


def _compared(
    pairs: Mapping[Setting, Setting],
    scores: Mapping[Setting, Scores],
    seed: int,
    groups: Sequence[int],
    chosen: Sequence[int] | None = None,
) -> dict[Setting, Comparison]:
    """Each key's scores against its value's, of questions in ``groups``; of the questions ``chosen`` alone."""
    pick = np.arange(len(groups)) if chosen is None else np.array(chosen)
    among = [groups[at] for at in pick.tolist()]
    return {
        mine: compare(scores[theirs][pick], scores[mine][pick], seed, DRAWS, among) for mine, theirs in pairs.items()
    }


def _wilson(right: Scores, groups: Sequence[int]) -> Interval:
    """Wilson's interval of the share of 1 in ``right`` (n,), as of fewer questions where they share pictures."""
    count = effective_count(right, groups)
    return Interval(*share_interval(float(right.mean()) * count, count))


def rows_of(
    settings: Sequence[Setting],
    items: Sequence[Item],
    results: Results,
    scoring: Scoring,
    metric: Metric = "exact-match",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row a setting, in order; the answers of all ``items`` are there.

    ``exact_match`` and its Wilson interval are always in it; what is compared is ``metric``. Questions that share a
    picture count together. FLOPs and seconds are an answer's, from the prompt's embeddings on.
    """
    groups = groups_of(items)
    answers = {setting: [results.get(setting, item) for item in items] for setting in settings}
    exact = {setting: scores_of(setting, items, results, scoring, "exact-match") for setting in settings}
    scores = exact
    if metric != "exact-match":
        scores = {setting: scores_of(setting, items, results, scoring, metric) for setting in settings}
    references, deciders = _references(settings), _deciders(settings)
    against = _compared(references, scores, seed, groups)
    verdicts = dict(zip(against, seen(list(against.values())), strict=True))
    decided = _compared(deciders, scores, seed, groups)
    decided_verdicts = dict(zip(decided, seen(list(decided.values())), strict=True))
    kinds = _kinds(items, groups, exact, scores, references, seed)
    rows = []
    for setting in settings:
        given, right = answers[setting], exact[setting]
        steps = sum(each.steps for each in given)
        merge = setting.merge
        row: dict[str, Any] = {
            "setting": setting.label,
            "id": setting.id,
            "loop": setting.loop,
            "layer": None if merge is None else merge.layer,
            "ratio": 0.0 if merge is None else merge.ratio,
            "schedule": "none" if merge is None else merge.schedule,
            "select": None if merge is None else merge.select,
            "commit": setting.rule,
            "questions": len(items),
            "exact_match": round(float(right.mean()), 4),
            "interval": rounded(_wilson(right, groups)),
        }
        if metric == "anls":
            mine = scores[setting]
            interval = mean_interval(mine, seed, DRAWS, groups)
            row |= {"anls": round(float(mine.mean()), 4), "anls_interval": rounded(interval)}
        row |= _NOT_COMPARED
        if setting in against:
            row |= comparison_json(against[setting], references[setting].label, verdicts[setting])
        row |= {
            "mean_kept": round(sum(each.mean_kept * each.steps for each in given) / steps, 4),
            "steps": round(steps / len(given), 4),
            "flops": round(sum(each.flops for each in given) / len(given)),
            "answer_seconds": spread([each.seconds for each in given]),
        }
        if setting in decided:
            told = comparison_json(decided[setting], deciders[setting].label, decided_verdicts[setting])
            told["equal_kept"] = keep_equally(given, answers[deciders[setting]])
            row["against_decider"] = told
        row["kinds"] = kinds[setting]
        row["merge"] = None if merge is None else merge.to_json()
        row["generation"] = setting.generation.to_json()
        rows.append(row)
    return rows


def _kinds(
    items: Sequence[Item],
    groups: Sequence[int],
    exact: Mapping[Setting, Scores],
    scores: Mapping[Setting, Scores],
    references: Mapping[Setting, Setting],
    seed: int,
) -> dict[Setting, dict[str, Any]]:
    """Results by kind of question, where there are several; all their comparisons are judged together."""
    names = list(dict.fromkeys(item.kind for item in items))
    found: dict[Setting, dict[str, Any]] = {setting: {} for setting in exact}
    if len(names) < 2:
        return found
    places = {name: [at for at, item in enumerate(items) if item.kind == name] for name in names}
    compared = {
        (setting, name): comparison
        for name, chosen in places.items()
        for setting, comparison in _compared(references, scores, seed, groups, chosen).items()
    }
    verdicts = dict(zip(compared, seen(list(compared.values())), strict=True))
    for setting, right in exact.items():
        for name, chosen in places.items():
            share = right[chosen]
            interval = _wilson(share, [groups[at] for at in chosen])
            entry: dict[str, Any] = {
                "questions": len(chosen),
                "exact_match": round(float(share.mean()), 4),
                "interval": rounded(interval),
            }
            if (setting, name) in compared:
                comparison = compared[setting, name]
                entry["difference"] = round(comparison.difference, 4)
                entry["difference_interval"] = rounded(comparison.difference_interval)
                entry["seen"] = verdicts[setting, name]
            found[setting][name] = entry
    return found
