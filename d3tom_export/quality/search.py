"""Successive halving over cost and score: which candidates are worth more questions. NumPy only.

A round asks all candidates left a number of questions, drops what cannot be wanted, and of the rest keeps the better
half; the next asks twice as many. One half of those kept are better by layers of the front: first what no other beats
in cost and score, then what only these beat, and so on. The other half are the best at costs spread over all that is
left: while few questions say little, most candidates tie, and the front alone would be the cheapest of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from d3tom_export.cost.pareto_figure import front
from d3tom_export.quality.intervals import units

Kind = TypeVar("Kind")

FINALISTS = 6
"""Candidates of which no half is dropped any more."""
_FEWEST = 4
"""Questions of the first round."""


def split(
    count: int, seed: int, check_share: float, groups: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """``count`` questions in two parts, to search and to check on, in a seeded order; neither is empty from two on.

    Questions of one of ``groups`` (n,) are in one part, unless all are of one
    (:func:`~d3tom_export.quality.intervals.units`).
    """
    generator, check = np.random.default_rng(seed), min(max(round(count * check_share), 1), count - 1)
    found = units(groups, count)
    if found is None:
        order = generator.permutation(count).tolist()
        return order[check:], order[:check]
    members: list[list[int]] = [[] for _ in range(int(found.max()) + 1)]
    for at, group in enumerate(found.tolist()):
        members[group].append(at)
    parts: tuple[list[int], list[int]] = ([], [])
    shuffled = generator.permutation(len(members)).tolist()
    for number, group in enumerate(shuffled):
        held_out = len(parts[1]) < check and (number < len(members) - 1 or bool(parts[0]))
        parts[held_out].extend(members[group])
    return parts


def rounds(candidates: int, questions: int) -> list[int]:
    """How many questions each round has asked by its end: the last all, each before it half as many, as far as it goes.

    As many rounds as it takes to halve ``candidates`` to :data:`FINALISTS`, but none that would ask nothing new.
    """
    halvings = max(0, math.ceil(math.log2(max(candidates, 1) / FINALISTS)))
    counts = [max(math.ceil(questions / 2**halving), min(_FEWEST, questions)) for halving in range(halvings + 1)]
    return sorted(set(counts))


def better_half(candidates: Sequence[Kind], points: Sequence[tuple[float, float]]) -> list[Kind]:
    """The better half of ``candidates``, at least :data:`FINALISTS`, in their order; ``points`` are (cost, score).

    One half of it by layers of the front, of a layer that does not fit whole its ends first, the best before the
    cheapest; the other half the best of as many groups of neighbours in cost.
    """
    keep = max(math.ceil(len(candidates) / 2), min(FINALISTS, len(candidates)))
    left, found = list(range(len(candidates))), list[int]()
    while (room := math.ceil(keep / 2) - len(found)) > 0:
        layer = [left[at] for at in front([points[index] for index in left])]
        if len(layer) > room:
            places = np.linspace(len(layer) - 1, 0, room).round().astype(int)
            layer = [layer[at] for at in places.tolist()]
        found += layer
        left = [index for index in left if index not in layer]
    left.sort(key=lambda index: points[index])
    groups = np.array_split(np.array(left, dtype=int), max(keep - len(found), 1))
    if len(found) < keep:
        found += [min(group.tolist(), key=lambda index: (-points[index][1], points[index][0])) for group in groups]
    return [candidates[index] for index in sorted(found)]
