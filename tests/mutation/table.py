"""The suite's account: how many faults, how many caught, which are listed and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tests.mutation.fault import Fault

KINDS = ("graph", "weights", "config", "manifest", "files", "backend", "build")


def counts(faults: Sequence[Fault]) -> str:
    """The numbers in a line: faults, caught, listed."""
    listed = sum(fault.reason is not None for fault in faults)
    of = Counter(fault.kind for fault in faults)
    kinds = ", ".join(f"{of[kind]} {kind}" for kind in KINDS if of[kind])
    return f"{len(faults)} faults ({kinds}): {len(faults) - listed} must be caught, {listed} may pass"


def markdown(faults: Sequence[Fault], figures: dict[str, str] | None = None) -> str:
    """The table of docs/trust.md: one row for each fault, those in several graphs together."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for fault in faults:
        answer = f"may pass: {fault.reason}" if fault.reason else f"caught by {fault.caught_by}"
        where = fault.place if not figures else f"{fault.place} ({figures[fault.id]})"
        rows.setdefault((fault.kind, fault.name, fault.precision, answer), []).append(where)
    lines = ["| kind | fault | where | precision | answer |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {kind} | {name} | {', '.join(places)} | {precision} | {answer} |"
        for (kind, name, precision, answer), places in rows.items()
    ]
    return "\n".join(lines)
