"""What an answer that was made cost: which of its steps merged what, and the FLOPs that follow. Imports no framework.

V visual tokens, K kept, G answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from d3tom_export.config import LanguageConfig, MergeConfig
from d3tom_export.cost.flops import StepMerge, Workload, answer_cost, prompt_plan


class Step(Protocol):
    """What is asked of a :class:`~d3tom_export.loop.denoise.StepRecord`."""

    @property
    def block(self) -> int: ...
    @property
    def keep(self) -> int: ...
    @property
    def merged(self) -> bool: ...


class RanSteps:
    """The merges of an answer's steps, told one by one as they run.

    Args:
        merge: What holds in the loop (:meth:`MergeConfig.in_loop`).
    """

    def __init__(self, merge: MergeConfig) -> None:
        self._merge = merge
        self._merged_in: set[int] = set()
        self.steps: list[StepMerge] = []

    def add(self, record: Step) -> None:
        """One more step ran."""
        per_block = self._merge.cache.remerge == "per-block"
        holds = self._merge.merge_at == "prefill" or (per_block and record.block in self._merged_in)
        self.steps.append(StepMerge(record.keep, not holds) if record.merged else StepMerge(None))
        if record.merged:
            self._merged_in.add(record.block)


def shares_kept(work: Workload, steps: Iterable[StepMerge]) -> list[float]:
    """The share of the V visual tokens that the layers behind l* see, of each step; 1 where there is none to see."""
    return [(work.visual_tokens - work.merged_away(step.keep)) / max(work.visual_tokens, 1) for step in steps]


def ran_flops(
    config: LanguageConfig, work: Workload, merge: MergeConfig, steps: Sequence[StepMerge], *, cached: bool
) -> int:
    """FLOPs of the matrix products of an answer of ``steps``, whatever policy selected.

    ``merge`` holds for the loop. A policy that drops what it does not keep searches for no target; "fastv" scores with
    one row in place of the answer's G, "random" and "uniform" with none.
    """
    cost = answer_cost(config, work, merge.layer, steps, cached=cached, prompt=prompt_plan(merge, work.visual_tokens))
    if merge.select == "decider" or cached:  # a cache is merged, whoever selects
        return cost.flops
    scored = cost.importance // work.answer_tokens if merge.select == "fastv" else 0
    return cost.flops - cost.search - cost.importance + scored
