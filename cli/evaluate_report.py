"""What ``d3tom-export evaluate`` reports to people: a table of its rows. A difference is told with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NAMES = {"exact-match": "exact match", "anls": "ANLS"}
_MOST_KINDS = 8
"""That are shown as columns; JSON has them all."""
_MARKS = {"lower": "-", "higher": "+", "none": " ", None: " "}


def percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.1%}"


def between(interval: Sequence[float | None] | None) -> str:
    """An interval of shares."""
    return "" if interval is None else f"({percent(interval[0])}-{percent(interval[1])})"


def retention_words(row: Mapping[str, Any]) -> str:
    """Retention with its interval."""
    if row["retention"] is None:
        return "-"
    low, high = ("?" if end is None else f"{end:.2f}" for end in row["retention_interval"])
    return f"{row['retention']:.2f} ({low}-{high})"


def difference_words(comparison: Mapping[str, Any]) -> str:
    """What of a difference was seen, in points of a hundred."""
    if comparison["seen"] is None:
        return ""
    if comparison["seen"] == "none":
        return "no difference seen"
    low, high = sorted(abs(100 * end) for end in comparison["difference_interval"])
    return f"{comparison['seen']} by {low:.1f} to {high:.1f} points"


def table(result: dict[str, Any]) -> str:
    """The table of ``result``, which is also what ``--json`` writes."""
    rows, metric = result["rows"], result["metric"]
    width = max(len(row["setting"]) for row in rows)
    other = metric != "exact-match"
    lines = [
        f"{result['model']} on {result['backend']} ({result['precision']}): {result['questions']} questions of "
        f"{result['data']}",
        "",
        f"{'':{width}} {'exact match':>24} "
        + (f"{_NAMES[metric]:>24} " if other else "")
        + f"{'retention':>18} {'kept':>6} {'steps':>6} {'GFLOP':>9} {'answer, ms':>10}  against unmerged",
    ]
    for row in rows:
        lines.append(
            f"{row['setting']:{width}} {percent(row['exact_match']) + ' ' + between(row['interval']):>24} "
            + (f"{percent(row['anls']) + ' ' + between(row['anls_interval']):>24} " if other else "")
            + f"{retention_words(row):>18} {row['mean_kept']:>6.1%} {row['steps']:>6.4g} {row['flops'] / 1e9:>9.2f} "
            f"{1e3 * row['answer_seconds']['median']:>10.2f}  {difference_words(row)}".rstrip()
        )
    lines += _against_deciders(rows, width)
    lines += _by_kind(rows, width)
    lines += ["", *_legend(result)]
    return "\n".join(lines)


def _against_deciders(rows: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    compared = [row for row in rows if "against_decider" in row]
    if not compared:
        return []
    lines = ["", "Other selections against the deciders', at equal numbers of kept tokens:"]
    for row in compared:
        against = row["against_decider"]
        unequal = "" if against["equal_kept"] else "; the numbers kept differ at some steps"
        low, high = (100 * end for end in against["difference_interval"])
        lines.append(f"{row['setting']:{width}} {difference_words(against)} ({low:+.1f} to {high:+.1f}){unequal}")
    return lines


def _by_kind(rows: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    kinds = list(rows[0]["kinds"])
    if not kinds:
        return []
    if len(kinds) > _MOST_KINDS:
        return ["", f"{len(kinds)} kinds of questions: see --json"]
    counts = [f"{kind[:16]} ({rows[0]['kinds'][kind]['questions']})" for kind in kinds]
    lines = ["", f"{'By kind of question (how many):':{width}} " + " ".join(f"{count:>24}" for count in counts)]
    for row in rows:
        cells = []
        for kind in kinds:
            entry = row["kinds"][kind]
            told = f"{percent(entry['exact_match'])} {between(entry['interval'])}"
            cells.append(f"{told}{_MARKS[entry.get('seen')]:1}")
        lines.append(f"{row['setting']:{width}} {' '.join(f'{cell:>24}' for cell in cells)}".rstrip())
    return lines


def _legend(result: Mapping[str, Any]) -> list[str]:
    rows, metric = result["rows"], result["metric"]
    lines = ["exact match: in brackets its 95 % interval (Wilson)"]
    if metric == "anls":
        lines.append("ANLS: in brackets its 95 % interval (bootstrap); retention and differences are of it")
    if any(row["against"] is not None for row in rows):
        lines.append(
            "retention: of the unmerged score, in brackets its 95 % interval (paired bootstrap over the questions, "
            "those of one picture together); a difference is told where its interval leaves 0 out and the sign-flip "
            "test of all comparisons together agrees"
        )
        lines.append(
            f"what {rows[0]['questions']} questions cannot show: where no score changes, a loss of up to "
            f"{100 * result['unseen_loss']:.1f} points (95 %, one-sided)"
        )
    first = rows[0]["setting"]
    others = [row for row in rows[1:] if row["schedule"] == "none"]
    if others:
        lines.append(f"unmerged rows after the first are compared with it ({first}), merged ones with their own loop's")
    if 0 < len(rows[0]["kinds"]) <= _MOST_KINDS:
        lines.append("by kind: - and + where a difference from unmerged was seen, of all kinds and settings together")
    lines.append("kept: visual tokens that layers behind l* see, over all steps; GFLOP: of an answer's matrix products")
    return lines
