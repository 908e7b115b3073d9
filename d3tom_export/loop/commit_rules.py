"""How many tokens a step commits where no plan says so: as many as the model is sure enough of.

The confidences c(1) >= c(2) >= ... are those of a row's positions that may be committed, within the block; each row of
a batch is judged by its own. The first is always committed. Sources: Fast-dLLM's ``generate.py`` (arXiv 2505.22618) for
"threshold" and "factor", Fast-dLLM++ (arXiv 2606.02955) for "frechet"; facts in fast-decoding.md.

B batch, G answer tokens. Imports no framework but NumPy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import GenerationConfig
from d3tom_export.loop.sampling import commit

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Committed(NamedTuple):
    """What a step commits."""

    transfer: Bools
    """(B, G)."""
    slack: Floats | None
    """(B, G), by how much a rule was met or missed: a position is committed where it is 0 or more ("frechet": more than
    0), the surest of a row, for which it is infinite, always. NaN at positions that could not be; None under a plan."""


def rule_slack(generation: GenerationConfig, ranked: Floats) -> Floats:
    """By how much each of the confidences ``ranked`` (n,), descending, is within the rule: (n,), non-increasing.

    * "threshold": c(k) >= threshold.
    * "factor": c(j) >= 1 - factor / (j + 1) for every j up to k, so that the walk stops at the first that fails. As in
      the original the last of all is taken with the one before it, whatever its own confidence.
    * "frechet": some n >= k has sum of c(i) up to n - (n - 1) > 1 - c(n) + margin: what the Frechet bounds say of all n
      tokens being right together.
    """
    count = np.arange(1, len(ranked) + 1)
    if generation.commit == "threshold":
        slack = ranked - generation.threshold
    elif generation.commit == "factor":
        slack = ranked - (1.0 - generation.factor / (count + 1))
        slack[:1] = np.inf
        slack = np.minimum.accumulate(slack)
        slack[1:][-1:] = slack[:-1][-1:]
    else:
        slack = np.cumsum(ranked) + ranked - count - generation.margin
        slack = np.maximum.accumulate(slack[::-1])[::-1].copy()
    slack[:1] = np.inf
    return slack


def commit_by_rule(generation: GenerationConfig, confidence: Floats, eligible: Bools) -> Committed:
    """What the rule of ``generation`` commits of the ``eligible`` (B, G) positions; at least one of each row's.

    ``confidence`` (B, G) are probabilities. Ties go to the lower position.
    """
    slack = np.full(confidence.shape, np.nan)
    counts = np.zeros(len(confidence), dtype=np.int64)
    for row, allowed in enumerate(eligible):
        places = np.flatnonzero(allowed)
        order = places[np.argsort(-confidence[row, places], kind="stable")]
        slack[row, order] = found = rule_slack(generation, confidence[row, order])
        counts[row] = np.sum(found > 0 if generation.commit == "frechet" else found >= 0)
    return Committed(commit(confidence, eligible, counts), slack)


def decide(generation: GenerationConfig, confidence: Floats, eligible: Bools, counts: Ints | None) -> Committed:
    """What a step commits: so many of each row as a plan's ``counts`` (B,) say, or where they are None as its rule."""
    if counts is None:
        return commit_by_rule(generation, confidence, eligible)
    return Committed(commit(confidence, eligible, counts), None)
