"""Within a stage that departs: the first block, then the first module of it, that does.

How parts are judged, and how little is held meanwhile, is :mod:`d3tom_export.diagnosis.probes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from numpy.typing import NDArray
from torch import nn

from d3tom_export.diagnosis.compare import SENSITIVE, Difference
from d3tom_export.diagnosis.graph import ModuleValues, StageGraph
from d3tom_export.diagnosis.probes import Examination, Probe
from d3tom_export.diagnosis.reference import ReferenceStage
from d3tom_export.diagnosis.trail import INPUT, OUTPUT, START, Call, Point
from d3tom_export.plugins.merge_op import OP_TYPE
from d3tom_export.progress import Progress, no_progress

Kind = Literal["module", "operations", "backend", "accumulated"]


@dataclass(frozen=True)
class Layer:
    """One line of the layer table."""

    name: str
    difference: Difference


@dataclass
class Descent:
    """What a descent into a stage found."""

    kind: Kind
    """"module": a module departs. "operations": what lies between modules does. "backend": the stage's graph is right
    on ONNX Runtime's CPU, so what the backend made of it is not. "accumulated": no part departs by itself."""
    name: str
    """The PyTorch module's name in the eager model, which is its weights' without the last part; of operations, the
    module around them."""
    difference: Difference
    value: str
    """The ONNX value that departs."""
    first_non_finite: str | None = None
    """Of operations that give NaN or infinity, or do not run: the first of ``nodes`` that does."""
    towards: str = ""
    """Of operations: the module or output that the value goes to."""
    weights: list[str] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    """Of operations: the graph's nodes that compute them, the last first."""
    graph: Path = Path()
    """The file whose parts were judged."""
    stream: list[str] = field(default_factory=list)
    """The graph's values of the residual stream between blocks."""
    layers: list[Layer] = field(default_factory=list)
    """Everything that was judged, in order, up to the culprit."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Modules up to the culprit that could not be judged, with the reason."""


class _Segment(NamedTuple):
    """What runs from the residual stream's entry into a block to its entry into the next."""

    start: Point
    cuts: tuple[str, ...]
    calls: range
    name: str


class Descender:
    """A descent into one call of a stage.

    Args:
        stage: The stage in PyTorch.
        inputs: What it was called with, by name.
        graph: Its graph.
        names: The eager model's module names by ``id(module)``.
        tolerances: Largest relative error of the whole stage and of a part.
        tied: Difference of cosine similarity that rounding may turn.
    """

    def __init__(
        self,
        stage: ReferenceStage,
        inputs: Mapping[str, NDArray[Any]],
        graph: StageGraph,
        names: Mapping[int, str],
        tolerances: tuple[float, float],
        tied: float,
        progress: Progress = no_progress,
    ) -> None:
        self._stage, self._graph, self._names, self._progress = stage, graph, names, progress
        self._whole, self._part = tolerances
        progress(f"following {stage.spec.name} module by module", 0, 1)
        self._examination = Examination(stage, inputs, graph)
        self._calls = self._examination.calls
        self._examination.follow_near_ties(tied)
        self._layers: list[Layer] = []

    def _module(self, scope: str) -> nn.Module:
        return self._stage.module.get_submodule(scope)

    def _name(self, scope: str) -> str:
        """The eager model's name of the module called ``scope`` in the stage."""
        return self._names.get(id(self._module(scope)), f"{self._stage.spec.name}.{scope}".rstrip("."))

    def _call_name(self, call: Call) -> str:
        return f"{OP_TYPE} in {self._name(call.group)}" if call.scope == OP_TYPE else self._name(call.scope)

    def _judge(self, probes: Sequence[Probe], tolerance: float) -> tuple[Probe, Difference] | None:
        """Judge ``probes`` in one pass, note the layers, and return the first departure."""
        found = self._examination.judge(probes, tolerance)
        self._layers += [Layer(probe.name, difference) for probe, difference in found]
        return found[-1] if found and found[-1][1].departs else None

    def _segments(self) -> list[_Segment]:
        begins = [0]
        for index, call in enumerate(self._calls[1:], start=1):
            new = call.group != self._calls[index - 1].group
            inputs = call.values.inputs if isinstance(call.values, ModuleValues) else ()
            if new and len(inputs) == 1 and inputs[0] not in self._graph.inputs:
                begins.append(index)
        ends = [*begins[1:], len(self._calls)]
        segments = []
        for begin, end in zip(begins, ends, strict=True):
            calls = range(begin, end)
            name = ", ".join(dict.fromkeys(self._name(self._calls[index].group) for index in calls))
            values = self._calls[begin].values if begin else None
            if isinstance(values, ModuleValues):
                segments.append(_Segment(Point(begin, INPUT), values.inputs, calls, name))
            else:
                segments.append(_Segment(START, (), calls, name or self._stage.spec.name))
        return segments

    def run(self, outputs: Sequence[str]) -> Descent:
        """Find what makes the ``outputs``, which depart, wrong."""
        order = [spec.name for spec in self._stage.spec.outputs]
        end = self._examination.end
        wrong = []
        for output in sorted(outputs, key=order.index):
            probe = Probe(START, (), end, output, order.index(output), f"graph on ONNX Runtime: {output}")
            if self._judge([probe], self._whole * SENSITIVE.get(output, 1.0)):
                wrong.append(probe)
        if not wrong:
            right = self._layers[-1].difference
            return self._descent("backend", self._stage.spec.name, right, outputs[0], len(self._calls))

        segments = self._segments()
        suspect = self._first_bad_segment(segments, wrong)
        if suspect is None:
            worst = max(self._layers[len(outputs) :], key=lambda layer: layer.difference.error)
            return self._descent("accumulated", worst.name, worst.difference, wrong[0].target, len(self._calls))
        return self._within(*suspect)

    def _first_bad_segment(
        self, segments: Sequence[_Segment], wrong: Sequence[Probe]
    ) -> tuple[_Segment, Probe, Difference] | None:
        """The first segment that departs, and by which probe: at the residual stream behind it, or at an output."""
        blocks = [
            Probe(segment.start, segment.cuts, following.start, following.cuts[0], 0, segment.name)
            for segment, following in pairwise(segments)
        ]
        by_start = {segment.start: segment for segment in segments}
        departure = self._judge(blocks, self._part) if blocks else None
        last = departure[0].start if departure else segments[-1].start
        # An output need not pass through the residual stream: prefill's keys, the caches that a merge returns.
        for probe in wrong:
            ancestors = self._graph.ancestors(probe.target)
            segment = [s for s in segments if set(s.cuts) <= ancestors][-1]
            if segment.start < last or not departure:
                own = probe._replace(start=segment.start, cuts=segment.cuts, name=f"{segment.name} to {probe.target}")
                found = self._judge([own], self._part)
                if found:
                    departure, last = found, segment.start
        return (by_start[departure[0].start], *departure) if departure else None

    def _within(self, segment: _Segment, closing: Probe, difference: Difference) -> Descent:
        """The first module of ``segment`` that departs, or the operations before it; else those before its end."""
        modules, between = self._parts(segment)
        judged = self._examination.judge(modules, self._part)
        for number, probe in enumerate(between):
            self._progress(f"between the modules of {segment.name}", number, len(between))
            if not (judged and judged[-1][1].departs and judged[-1][0].stop < probe.stop):
                judged = sorted([*judged, *self._examination.judge([probe], self._part)], key=lambda item: item[0].stop)
                judged = judged[: next((i for i, item in enumerate(judged, 1) if item[1].departs), None)]
        self._layers += [Layer(probe.name, found) for probe, found in judged]
        if not judged or not judged[-1][1].departs:
            following = segment.calls.stop
            last = closing.stop.call == len(self._calls)
            towards = f"output {closing.target}" if last else self._call_name(self._calls[following])
            return self._operations(segment, closing, difference, following, towards)
        probe, difference = judged[-1]
        call = self._calls[probe.stop.call]
        name = self._call_name(call)
        if probe.stop.side == INPUT:
            return self._operations(segment, probe, difference, probe.stop.call, name)
        weights = []
        if call.scope != OP_TYPE:
            weights = [f"{name}.{weight}" for weight, _ in self._module(call.scope).named_parameters()]
        return self._descent("module", name, difference, probe.target, probe.stop.call, weights=weights)

    def _parts(self, segment: _Segment) -> tuple[list[Probe], list[Probe]]:
        """Probes of the segment's modules, and of the values that reach them from other operations."""
        modules, between = [], []
        known = {*self._graph.inputs, *segment.cuts}
        for index in segment.calls:
            call = self._calls[index]
            if isinstance(call.values, str):
                continue
            name = self._call_name(call)
            for position, value in enumerate(call.values.inputs):
                if value not in known:
                    known.add(value)
                    point = Point(index, INPUT)
                    between.append(Probe(segment.start, segment.cuts, point, value, position, f"what reaches {name}"))
            known.add(call.values.output)
            point = Point(index, OUTPUT)
            modules.append(Probe(Point(index, INPUT), call.values.inputs, point, call.values.output, 0, name))
        return modules, between

    def _operations(
        self, segment: _Segment, probe: Probe, difference: Difference, before: int, towards: str
    ) -> Descent:
        """A departure that no module makes: between those before the call numbered ``before`` and ``probe``'s end."""
        earlier = [self._calls[index] for index in segment.calls if index < before]
        outputs = [call.values.output for call in earlier if isinstance(call.values, ModuleValues)]
        nodes = self._graph.part(probe.target, [*segment.cuts, *outputs])
        values = self._graph.computing(nodes)
        broken = None
        if difference.problem is not None:
            broken = self._examination.first_non_finite(segment.start, segment.cuts, values)
        return self._descent(
            "operations",
            segment.name,
            difference,
            probe.target,
            before,
            weights=self._graph.weights(nodes),
            nodes=[self._graph.node_name(value) for value in values[::-1]],
            first_non_finite=None if broken is None else self._graph.node_name(broken),
            towards=towards,
        )

    def _descent(self, kind: Kind, name: str, difference: Difference, value: str, upto: int, **details: Any) -> Descent:
        self._progress(f"{self._stage.spec.name} followed", 1, 1)
        skipped = {
            self._call_name(call): call.values for call in self._calls[: upto + 1] if isinstance(call.values, str)
        }
        stream = [cut for segment in self._segments() for cut in segment.cuts]
        details |= {"graph": self._graph.path, "stream": stream, "layers": self._layers, "skipped": skipped}
        return Descent(kind, name, difference, value, **details)
