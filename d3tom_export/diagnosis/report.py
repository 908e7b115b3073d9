"""What a diagnosis found, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import Loop
from d3tom_export.diagnosis.compare import Difference
from d3tom_export.diagnosis.layers import Descent
from d3tom_export.errors import listing
from d3tom_export.parity.validate import Report


@dataclass
class StageResult:
    """One stage of one loop over all of its calls."""

    stage: str
    """Its key in the bundle."""
    loop: Loop
    tolerance: float
    calls: int = 0
    """Compared calls; 0: no step of the answers ran it."""
    near_ties: int = 0
    """Calls in which kept tokens or tokens differed by less than float32 resolves. Where the kept set did, nothing
    else of the call compares."""
    output: str = ""
    worst: Difference | None = None
    """The largest difference, of ``output``, by its tolerance."""
    first: str | None = None
    """Where it departed first."""

    def note(self, output: str, difference: Difference) -> None:
        """Keep ``difference`` if it is the largest; an output that does not compare at all is the largest there is."""
        if self.worst is None or self._size(difference) > self._size(self.worst):
            self.output, self.worst = output, difference

    @staticmethod
    def _size(difference: Difference) -> float:
        size = difference.error / difference.tolerance
        return float("inf") if np.isnan(size) else size


@dataclass
class Departure:
    """The first call of a stage that departs."""

    stage: str
    """Its key in the bundle."""
    loop: Loop
    where: str
    """The sample and the step."""
    outputs: dict[str, Difference]
    """Those that depart."""
    inputs: dict[str, NDArray[Any]] = field(default_factory=dict)
    """What the stage was called with."""


@dataclass
class Diagnosis:
    """What :func:`d3tom_export.diagnosis.stagewise.diagnose` found."""

    backend: str
    precision: str
    cut: Report
    """The stages' modules, run one after another in PyTorch, against the eager model: whether the cut is right."""
    stages: list[StageResult] = field(default_factory=list)
    first: Departure | None = None
    descent: Descent | None = None
    """Where in the stage, if that was asked and something departed."""

    @property
    def passed(self) -> bool:
        return self.first is None and self.cut.passed and any(stage.calls for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """JSON knows no NaN or infinity; null, with a ``problem``, stands for them."""
        first, descent = self.first, self.descent
        return {
            "passed": self.passed,
            "backend": self.backend,
            "precision": self.precision,
            "cut": self.cut.to_json(),
            "stages": [
                {
                    "stage": stage.stage,
                    "loop": stage.loop,
                    "calls": stage.calls,
                    "near_ties": stage.near_ties,
                    "output": stage.output,
                    "first_departure": stage.first,
                    **_numbers(stage.worst),
                }
                for stage in self.stages
            ],
            "first_bad_stage": None
            if first is None
            else {
                "stage": first.stage,
                "loop": first.loop,
                "where": first.where,
                "outputs": {name: _numbers(difference) for name, difference in first.outputs.items()},
            },
            "layers": None
            if descent is None
            else {
                "kind": descent.kind,
                "module": descent.name,
                "graph": descent.graph.name,
                "value": descent.value,
                "weights": descent.weights,
                "towards": descent.towards or None,
                "nodes": descent.nodes,
                "first_non_finite": descent.first_non_finite,
                **_numbers(descent.difference),
                "judged": [{"name": layer.name, **_numbers(layer.difference)} for layer in descent.layers],
                "skipped": descent.skipped,
            },
        }

    def lines(self) -> list[str]:
        """The report as text."""
        answers = f"{self.cut.samples} answer{'' if self.cut.samples == 1 else 's'}"
        lines = [
            f"{'PASSED' if self.passed else 'FAILED'}: {self.backend} ({self.precision}), {answers}, stage by stage"
        ]
        rows = [("stage", "calls", "largest error", "allowed", "")]
        for stage in self.stages:
            if stage.worst is None:
                rows.append((stage.stage, "0", "-", f"{stage.tolerance:.0e}", "not run by these steps"))
                continue
            verdict = "ok"
            if stage.first:
                problem = f" ({stage.worst.problem})" if stage.worst.problem else ""
                verdict = f"DEPARTS in {stage.output}{problem}, first at {stage.first}"
            if stage.near_ties:
                verdict += f" (near-ties in {stage.near_ties})"
            rows.append((stage.stage, str(stage.calls), *_columns(stage.worst), verdict))
        lines += _table(rows)
        lines += self._cut_lines()
        descent = self.descent
        if descent is not None and self.first is not None:
            lines.append(f"inside {descent.graph.name} at {self.first.where}, each part on the reference's own input")
            named = [(layer.name, *_columns(layer.difference), _verdict(layer.difference)) for layer in descent.layers]
            lines += _table([("part", "largest error", "allowed", ""), *named])
            if descent.skipped:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in descent.skipped.items())
                lines.append(f"  not judged, {len(descent.skipped)} modules: {reasons}")
        return [*lines, self.verdict()]

    def _cut_lines(self) -> list[str]:
        cut = self.cut
        state = "ok" if cut.passed else f"DEPARTS: {cut.problems[0] if cut.problems else 'logits'}"
        return [
            f"  the stages in PyTorch against the eager model: largest logit difference {cut.max_abs_logit_error:.1e} "
            f"(allowed {cut.logit_tolerance:.0e}), {state}"
        ]

    def verdict(self) -> str:
        """One sentence: the culprit, or that there is none."""
        first, descent = self.first, self.descent
        if first is None:
            if self.cut.passed:
                return "Nothing departs."
            return (
                "Every stage does what its PyTorch module does, but the modules together depart from the eager model: "
                "the fault is in d3tom_export/stages, not in the graphs or the backend."
            )
        output, difference = next(iter(first.outputs.items()))
        if descent is None:
            return (
                f"First bad stage: {first.stage}, {_amount(difference)} in {output} at {first.where}; "
                "--layers looks inside."
            )
        at = f"{_amount(descent.difference)} at {first.where}"
        if descent.kind == "module":
            weights = f" (weights {', '.join(descent.weights[:3])})" if descent.weights else ""
            return f"Culprit: stage {first.stage}, module {descent.name}{weights}, {at}."
        if descent.kind == "operations":
            nodes = f"nodes, the last first: {listing(descent.nodes, 6)}"
            if descent.first_non_finite:
                nodes = f"the first node at fault: {descent.first_non_finite}"
            return (
                f"Culprit: stage {first.stage}, operations of {descent.name} on the way to {descent.towards} (value "
                f"{descent.value}; {nodes}), {at}."
            )
        if descent.kind == "backend":
            right = "the stage's graph gives the right values on ONNX Runtime's CPU."
            if self.backend.startswith("onnxruntime"):
                right = (
                    "the standard graph gives the right values on ONNX Runtime's CPU, so look at the one rewritten for "
                    "the CPU, or at the other device, whichever ran."
                )
            return (
                f"Culprit: what {self.backend} made of stage {first.stage}, {_amount(difference)} in {output} at "
                f"{first.where}; {right}"
            )
        return (
            f"Stage {first.stage} departs at {first.where}, but none of its parts does by itself: their errors add up. "
            f"The largest is that of {descent.name}, {_amount(descent.difference)}."
        )


def _numbers(difference: Difference | None) -> dict[str, Any]:
    if difference is None:
        return {"error": None, "largest": None, "tolerance": None, "departs": False, "problem": None}
    return {
        "error": difference.error if np.isfinite(difference.error) else None,
        "largest": difference.largest if np.isfinite(difference.largest) else None,
        "tolerance": difference.tolerance,
        "departs": difference.departs,
        "problem": difference.problem,
    }


def _amount(difference: Difference) -> str:
    if difference.problem is not None:
        return difference.problem
    return f"relative error {difference.error:.1e} (allowed {difference.tolerance:.0e})"


def _columns(difference: Difference) -> tuple[str, str]:
    return ("-" if difference.problem else f"{difference.error:.1e}", f"{difference.tolerance:.0e}")


def _verdict(difference: Difference) -> str:
    if not difference.departs:
        return "ok"
    return f"DEPARTS: {difference.problem}" if difference.problem else "DEPARTS"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """``rows`` in columns: names to the left, numbers to the right, the last as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        "  "
        + "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)), row[-1]]
        ).rstrip()
        for row in rows
    ]
