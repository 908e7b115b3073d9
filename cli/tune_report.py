"""What ``d3tom-export tune`` reports: what was searched, the front, each check, and the choice with its command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .evaluate_report import percent, retention_words

if TYPE_CHECKING:
    from d3tom_export.loop.backend import Backend
    from d3tom_export.quality.tuning import Asked, Outcome, Tuning

    from .quality_source import Source

_UNITS = {"flops": (1e9, "GFLOP"), "time": (1e-3, "ms")}
_SIDED = "95 %, one-sided, all checks together"


def _asked_json(asked: Asked, lowest: float | None) -> dict[str, Any]:
    from d3tom_export.quality.report import rounded

    retention = asked.comparison.retention
    return {
        "setting": asked.setting.label,
        "id": asked.setting.id,
        "questions": asked.questions,
        "cost": round(asked.cost, 6),
        "score": round(asked.score, 4),
        "retention": None if retention is None else round(retention, 4),
        "retention_interval": rounded(asked.comparison.retention_interval),
        "lowest_retention": None if lowest is None else round(lowest, 4),
        "mean_kept": round(asked.mean_kept, 4),
        "steps": round(asked.steps, 4),
        **asked.setting.to_json(),
    }


def as_json(tuning: Tuning, outcome: Outcome, source: Source, backend: Backend, command: str | None) -> dict[str, Any]:
    """The result as ``--json`` has it. Costs are FLOPs or seconds, as the goal counts."""
    from d3tom_export.cost.pareto_figure import front

    goal, reference = tuning.goal, outcome.reference
    shown = [reference, *outcome.finalists]
    best = {shown[at].setting for at in front([(each.cost, each.score) for each in shown])}
    checked, check = outcome.reference_check, None
    if checked is not None:
        check = {
            "questions": checked.questions,
            "level": round(outcome.check_level, 6),
            "reference": _asked_json(checked, checked.lowest),
            "tried": [{**_asked_json(each, each.lowest), "holds": tuning.holds(each)} for each in outcome.checks],
            "unseen_loss": round((1.0 - checked.lowest) * checked.score, 4),
        }
    return {
        "model": source.name,
        "backend": backend.name,
        "precision": backend.precision,
        "metric": tuning.metric,
        "min_retention": goal.min_retention,
        "max_cost": goal.max_cost,
        "cost": goal.cost,
        "proven": goal.proven,
        "seed": tuning.seed,
        "candidates": len(tuning.settings) - (goal.min_retention is not None),
        "searched_on": reference.questions,
        "rounds": [
            {"questions": each.questions, "candidates": each.candidates, "dropped": each.dropped}
            for each in outcome.rounds
        ],
        "reference": _asked_json(reference, None),
        "finalists": [
            _asked_json(each, each.lowest) | {"on_front": each.setting in best} for each in outcome.finalists
        ],
        "left_behind": [_asked_json(each, None) for each in outcome.others],
        "check": check,
        "chosen": None if outcome.chosen is None else outcome.chosen.setting.label,
        "command": command,
        "passed": outcome.chosen is not None,
    }


def _row(each: Mapping[str, Any], width: int, unit: float, mark: str = "") -> str:
    return (
        f"{each['setting']:{width}} {each['cost'] / unit:>10.2f} {percent(each['score']):>7} "
        f"{retention_words(each):>18} {each['mean_kept']:>7.1%} {each['steps']:>6.4g}  {mark}"
    ).rstrip()


def _head(what: str, width: int, name: str) -> str:
    return f"{what:{width}} {name:>10} {'score':>7} {'retention':>18} {'kept':>7} {'steps':>6}"


def text(result: Mapping[str, Any]) -> str:
    """``result`` for people."""
    unit, name = _UNITS[result["cost"]]
    reference, finalists, check = result["reference"], result["finalists"], result["check"]
    rows = [reference, *finalists, *(check["tried"] if check else [])]
    width = max(28, *(len(row["setting"]) for row in rows))
    rounds = ", ".join(f"{each['candidates']} with {each['questions']}" for each in result["rounds"])
    lines = [
        f"{result['model']} on {result['backend']} ({result['precision']}), questions of {result['data']}: "
        f"{result['candidates']} candidates searched on {result['searched_on']} of them (split with seed "
        f"{result['seed']})",
        f"asked: {rounds}",
        "",
        _head("Finalists, cheapest first", width, name),
        *(_row(each, width, unit, "on the front" if each["on_front"] else "") for each in finalists),
        _row(reference, width, unit, "what retention is of"),
    ]
    if check:
        lines += ["", _head(f"Checked on {check['questions']} others", width, name)]
        last = check["tried"][-1]
        for each in check["tried"]:
            next_one = "next best" if result["min_retention"] is None else "next safer"
            following = "" if each is last else f": the {next_one} one is tried"
            lines.append(_row(each, width, unit, f"{_verdict(result, each)}{following}"))
    return "\n".join([*lines, "", *_conclusion(result, unit, name)])


def _verdict(result: Mapping[str, Any], checked: Mapping[str, Any]) -> str:
    floor = result["min_retention"]
    if floor is None:
        return "within the budget" if checked["holds"] else "over the budget"
    if not checked["holds"]:
        return "not proven" if (checked["retention"] or 0) >= floor else "below the floor"
    return "keeps the floor, proven" if checked["lowest_retention"] >= floor else "keeps the floor"


def _conclusion(result: Mapping[str, Any], unit: float, name: str) -> list[str]:
    floor, check = result["min_retention"], result["check"]
    goal = (
        f"keeps a retention of {floor:g}" if floor is not None else f"stays within {result['max_cost'] / unit:g} {name}"
    )
    if not result["passed"]:
        return _nothing(result, goal, unit, name)
    chosen = check["tried"][-1]
    earlier = len(check["tried"]) - 1
    fallback = (
        f"; {earlier} cheaper or better ones did not hold on the questions they were checked on" if earlier else ""
    )
    share = chosen["cost"] / check["reference"]["cost"]
    lines = [
        f"Choice: {chosen['setting']}, {chosen['cost'] / unit:.2f} {name} an answer ({share:.0%} of unmerged)"
        f"{fallback}."
    ]
    if floor is not None:
        low = chosen["lowest_retention"]
        lines.append(
            f"It {goal} on {check['questions']} questions that it was not searched on: {retention_words(chosen)}. "
            + (
                f"Its lowest retention, {low:.3f} ({_SIDED}), keeps it too."
                if low >= floor
                else f"So many questions cannot tell it from a retention of {low:.2f} ({_SIDED}); --proven asks for "
                "more than the estimate."
            )
        )
    else:
        lines.append(f"It {goal}, with a retention of {retention_words(chosen)} on questions it was not searched on.")
    lines += ["", result["command"], *result["command_notes"]]
    if "figure" in result:
        lines += ["", f"picture: {result['figure']}"]
    return lines


def _nothing(result: Mapping[str, Any], goal: str, unit: float, name: str) -> list[str]:
    check, finalists = result["check"], result["finalists"]
    if check:
        found = f"{len(check['tried'])} that did on those searched on did not on the others"
    elif finalists:
        best = max(finalists, key=lambda each: (each["retention"] or 0, -each["cost"]))
        found = f"the best of the finalists is {best['setting']}: {best['cost'] / unit:.2f} {name}, retention "
        found += retention_words(best)
    else:
        found = "every one was dropped while they were searched"
    if result["min_retention"] is not None:
        goal = f"{goal} and costs less than unmerged answers"
    lines = [f"FAILED: none of {result['candidates']} candidates {goal} ({found})."]
    if result["min_retention"] is None:
        lines.append("Raise the budget, or widen the search with --ratio, --layer, --loop and --commit.")
    else:
        lines.append(
            "Lower the floor, search gentler settings (--ratio 0.3,0.5 --schedule fixed, a later --layer), or give "
            "more questions with --samples or --data."
        )
        if result["proven"] and check:
            lines.append(
                f"--proven: {check['questions']} questions of which none changes prove a retention of "
                f"{check['reference']['lowest_retention']:.3f} at most ({_SIDED})."
            )
    return lines
