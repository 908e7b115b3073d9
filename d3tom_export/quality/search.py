"""Successive halving over cost and score: which candidates are worth more questions. NumPy only.

A round asks all candidates left a number of questions, drops what cannot be wanted, and of the rest keeps the better
half; the next asks twice as many. Better is layer by layer of the front: first those that no other beats in cost and
score, then those that only these beat, and so on, so that cheap and safe ones stay side by side while few questions say
little about either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from d3tom_export.cost.pareto_figure import front

Kind = TypeVar("Kind")

FINALISTS = 4
"""Candidates of which no half is dropped any more."""
_FEWEST = 2
"""Questions of the first round."""


def split(count: int, seed: int, check_share: float) -> tuple[list[int], list[int]]:
    """``count`` questions in two parts, to search and to check on, in a seeded order; neither is empty from two on."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    check = min(max(round(count * check_share), 1), count - 1)
    return order[check:], order[:check]


def rounds(candidates: int, questions: int) -> list[int]:
    """How many questions each round has asked by its end: the last all, each before it half as many, as far as it goes.

    As many rounds as it takes to halve ``candidates`` to :data:`FINALISTS`.
    """
    halvings = max(0, math.ceil(math.log2(max(candidates, 1) / FINALISTS)))
    counts = [max(math.ceil(questions / 2**halving), min(_FEWEST, questions)) for halving in range(halvings + 1)]
    return counts[::-1]


def better_half(candidates: Sequence[Kind], points: Sequence[tuple[float, float]]) -> list[Kind]:
    """The better half of ``candidates``, at least :data:`FINALISTS`, by layers of the front of their ``points``.

    Of the layer that does not fit whole, those that are spread over it, its ends first: the cheapest and the best.
    """
    keep = max(math.ceil(len(candidates) / 2), min(FINALISTS, len(candidates)))
    left, found = list(range(len(candidates))), list[int]()
    while len(found) < keep:
        layer = [left[at] for at in front([points[index] for index in left])]
        room = keep - len(found)
        if len(layer) > room:
            places = np.linspace(len(layer) - 1, 0, room).round().astype(int)  # one alone is the best, not the cheapest
            layer = [layer[at] for at in dict.fromkeys(places.tolist())]
        found += layer
        left = [index for index in left if index not in layer]
    return [candidates[index] for index in sorted(found)]
