"""Parts of a stage's graph judged against the reference, each by itself.

A part is fed what the reference has at its beginning, so an error is blamed on the part that makes it and on none
behind it. A part's result is computed while the reference stands at the beginning and compared when the reference
reaches the end. So beside the stage's inputs two activations are held at a time, whatever the number of layers: what a
part begins with and its result, then its result and the reference's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from d3tom_export.diagnosis.compare import Difference, compare
from d3tom_export.diagnosis.graph import ModuleValues, StageGraph
from d3tom_export.diagnosis.reference import ReferenceStage
from d3tom_export.diagnosis.trail import INPUT, OUTPUT, START, Point, trail, walk
from d3tom_export.errors import D3tomError
from d3tom_export.merging.merge import gather_rows, nearest_kept
from d3tom_export.plugins.merge_op import OP_TYPE


class Probe(NamedTuple):
    """A part of the graph: from the reference's values at ``start`` to ``target``, compared at ``stop``."""

    start: Point
    cuts: tuple[str, ...]
    """What the graph calls the values at ``start``."""
    stop: Point
    target: str
    position: int
    """Which of the values at ``stop`` ``target`` is."""
    name: str
    """What the user is told it is."""


class _EnoughError(Exception):
    """A pass has answered all of its probes, or found a departure."""


def _open_choices(normed: Tensor, kept: Tensor, within: float) -> Tensor:
    """For each token that may join either of several kept ones, which those are: (B, V, K) bool, else all False."""
    unit = F.normalize(normed.float(), dim=-1)
    similarity = unit @ gather_rows(unit, kept).transpose(1, 2)
    close = similarity >= similarity.amax(dim=-1, keepdim=True) - within
    stays = torch.zeros(normed.shape[:2], dtype=torch.bool).scatter(1, kept, True)
    return close & ((close.sum(dim=-1) > 1) & ~stays).unsqueeze(-1)


class Examination:
    """One call of one stage, under examination."""

    def __init__(self, stage: ReferenceStage, inputs: Mapping[str, NDArray[Any]], graph: StageGraph) -> None:
        self.module, self.graph = stage.module, graph
        self._arguments = stage.tensors(inputs)
        names = [spec.name for spec in stage.spec.inputs]
        self._feeds = {name: tensor.numpy() for name, tensor in zip(names, self._arguments, strict=True)}
        self.calls = trail(stage.module, self._arguments, graph)
        self.end = Point(len(self.calls), INPUT)
        self._nearest: list[Tensor] = []
        self._exempt: dict[Point, NDArray[np.bool_]] = {}

    def _result(self, probe: Probe, tensors: Sequence[Tensor]) -> NDArray[Any] | D3tomError:
        feeds = self._feeds | {name: t.numpy() for name, t in zip(probe.cuts, tensors, strict=False)}
        try:
            return self.graph.run(probe.target, feeds, probe.cuts)
        except D3tomError as error:
            return error

    def follow_near_ties(self, within: float) -> None:
        """Let the reference's merges go the graph's way where the similarities of a token differ by less than that.

        Which way that is, the graph's own rows say: a merge compares in float32, whatever precision they come in. A
        merge that is judged alone sees other rows, so the kept tokens in question are exempt there.
        """
        nearest: list[Tensor] = []

        def see(point: Point, tensors: Sequence[Tensor]) -> None:
            if point.side != INPUT or point.call >= len(self.calls) or self.calls[point.call].scope != OP_TYPE:
                return
            _, normed, kept = tensors
            values = self.calls[point.call].values
            choice = nearest_kept(normed, kept)
            open_to = _open_choices(normed, kept, within)
            tied = open_to.any(dim=-1)
            if tied.any() and isinstance(values, ModuleValues):
                self._exempt[Point(point.call, OUTPUT)] = open_to.any(dim=1).numpy()
                rows = self._result(Probe(START, (), point, values.inputs[1], 1, ""), [])
                if not isinstance(rows, D3tomError) and rows.shape == tuple(normed.shape):
                    choice = torch.where(tied, nearest_kept(torch.from_numpy(rows), kept), choice)
            nearest.append(choice)

        walk(self.module, self._arguments, see)
        self._nearest = nearest

    def first_non_finite(self, start: Point, cuts: tuple[str, ...], targets: Sequence[str]) -> str | None:
        """The first of the float values ``targets``, in the order given, that is not finite, from ``start`` on."""
        held: list[Tensor] = []

        def see(point: Point, tensors: Sequence[Tensor]) -> None:
            if point == start:
                held.extend(tensors[: len(cuts)])
                raise _EnoughError

        with suppress(_EnoughError):
            see(START, [])
            walk(self.module, self._arguments, see, self._nearest)
        for target in targets:
            result = self._result(Probe(start, cuts, start, target, 0, target), held)
            if isinstance(result, D3tomError) or not np.isfinite(result).all():
                return target
        return None

    def _compare(
        self, probe: Probe, result: NDArray[Any] | D3tomError, tensors: Sequence[Tensor], tolerance: float
    ) -> tuple[Probe, Difference]:
        if isinstance(result, D3tomError):
            return probe, Difference(np.inf, np.inf, tolerance, str(result))
        exempt = self._exempt.get(probe.stop)
        return probe, compare(result, tensors[probe.position].numpy(), tolerance, exempt=exempt)

    def judge(self, probes: Sequence[Probe], tolerance: float) -> list[tuple[Probe, Difference]]:
        """The probes' differences in one pass of the reference, up to the first departure. They must not overlap."""
        found: list[tuple[Probe, Difference]] = []
        beginning = {probe.start: probe for probe in probes}
        held: list[tuple[Probe, NDArray[Any] | D3tomError]] = []

        def see(point: Point, tensors: Sequence[Tensor]) -> None:
            if held and held[0][0].stop == point:
                found.append(self._compare(*held.pop(), tensors, tolerance))
                if found[-1][1].departs or len(found) == len(probes):
                    raise _EnoughError
            if point in beginning:
                assert not held, "probes of one pass overlap"
                held.append((beginning[point], self._result(beginning[point], tensors)))

        with suppress(_EnoughError):
            see(START, [])
            _, outputs = walk(self.module, self._arguments, see, self._nearest)
            see(self.end, outputs)
        return found
