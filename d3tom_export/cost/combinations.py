"""Every way in which an answer may be made: its loop, its merging, and what commits its tokens.

Imports no framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from d3tom_export.config import CommitRule, GenerationConfig, Loop, MergeConfig, Remerge

Merging = Literal["unmerged", "step", "prefill"]
"""Where visual tokens merge: nowhere, at the steps, or once, while the prompt is prefilled."""


@dataclass(frozen=True)
class Combination:
    """A loop, with or without merging, under a plan or a commit rule."""

    loop: Loop
    merging: Merging
    commit: CommitRule = "plan"
    remerge: Remerge | None = None
    """How often a cache is merged anew, where not as the base configuration says."""
    by: str = ""
    """Who answers, where several are compared."""

    @property
    def merged(self) -> bool:
        return self.merging != "unmerged"

    @property
    def label(self) -> str:
        by, merging = f"{self.by}: " if self.by else "", {"step": " + D3ToM", "prefill": " + D3ToM at prefill"}
        rule = "" if self.commit == "plan" else f", {self.commit}"
        rhythm = "" if self.remerge is None else f", {self.remerge}"
        return f"{by}{self.loop}{merging.get(self.merging, '')}{rule}{rhythm}"

    def merge(self, base: MergeConfig) -> MergeConfig:
        """``base``, switched off where this combination does not merge, and to where it does."""
        if self.merging == "unmerged":
            return replace(base, schedule="none")
        cache = base.cache if self.remerge is None else replace(base.cache, remerge=self.remerge)
        return replace(base, merge_at=self.merging, cache=cache)

    def generation(self, plan: GenerationConfig, rules: Mapping[CommitRule, GenerationConfig]) -> GenerationConfig:
        """How it commits: as ``plan`` says, or its rule's settings of ``rules``."""
        return plan if self.commit == "plan" else rules[self.commit]


def combinations_of(
    loops: Sequence[Loop],
    *,
    merges: bool = True,
    at_step: bool = True,
    at_prefill: bool = False,
    rules: Sequence[CommitRule] = (),
) -> list[Combination]:
    """Every loop of ``loops`` unmerged and, where it ``merges``, merged; under a plan and then each of ``rules``.

    With a KV cache it merges ``at_step``, ``at_prefill``, or in both ways one after the other.
    """
    ways: dict[Loop, list[Merging]] = {"uncached": ["unmerged", "step"] if merges else ["unmerged"]}
    ways["cached"] = ["unmerged"]
    if merges:
        ways["cached"] += [*(["step"] if at_step else []), *(["prefill"] if at_prefill else [])]  # type: ignore[list-item]
    plan: tuple[CommitRule, ...] = ("plan",)
    return [
        Combination(loop, merging, commit) for commit in (*plan, *rules) for loop in loops for merging in ways[loop]
    ]
