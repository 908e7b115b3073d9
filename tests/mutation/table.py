"""The suite's account: how many faults, how many caught, which are listed and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tests.mutation.fault import Fault

PROPERTY = "fault"
"""What a test records of the fault that it put in: how it was answered."""

KINDS = ("graph", "weights", "config", "manifest", "files", "backend", "build")


def counts(faults: Sequence[Fault]) -> str:
    """The numbers in a line: faults, caught, listed."""
    listed, missed = sum(fault.reason is not None for fault in faults), sum(bool(fault.missed) for fault in faults)
    of = Counter(fault.kind for fault in faults)
    kinds = ", ".join(f"{of[kind]} {kind}" for kind in KINDS if of[kind])
    return (
        f"{len(faults)} faults ({kinds}): {len(faults) - listed - missed} are caught, {listed} may pass, "
        f"{missed} are missed as yet"
    )


def markdown(faults: Sequence[Fault]) -> str:
    """The table of docs/trust.md: one row for each fault, those in several graphs together."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for fault in faults:
        answer = f"caught by {fault.caught_by or 'parity or opening'}"
        answer = f"may pass: {fault.reason}" if fault.reason else f"missed: {fault.missed}" if fault.missed else answer
        rows.setdefault((fault.kind, fault.name, fault.precision, answer), []).append(fault.place)
    lines = ["| kind | fault | where | precision | answer |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {kind} | {name} | {', '.join(places)} | {precision} | {answer} |"
        for (kind, name, precision, answer), places in rows.items()
    ]
    return "\n".join(lines)


def summary(properties: Iterable[tuple[str, object]]) -> str:
    """A line for the end of a test session, from what its tests recorded."""
    outcomes = Counter(str(value) for name, value in properties if name == PROPERTY)
    return ", ".join([f"{sum(outcomes.values())} faults", *(f"{outcomes[name]} {name}" for name in sorted(outcomes))])
