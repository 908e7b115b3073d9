"""Settings to compare: a loop, a merge or none, and how answers are denoised; and which of them a bundle's graphs run.

Imports no framework.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from d3tom_export.config import CacheMergeConfig, GenerationConfig, Loop, MergeConfig
from d3tom_export.errors import D3tomError, listing

NO_MERGE = MergeConfig(layer=0, ratio=0.0, schedule="none")
"""What the loop is given where nothing merges."""

_EXTERNAL = ("random", "uniform")
"""Policies whose scores come from the host: graphs for one serve the other."""


@dataclass(frozen=True)
class Setting:
    """One way of answering. Equal ones answer equally."""

    loop: Loop
    merge: MergeConfig | None
    """What counts in the loop (:meth:`MergeConfig.in_loop`, but for what it does not look at); None: nothing merges."""
    generation: GenerationConfig

    @classmethod
    def of(cls, loop: Loop, merge: MergeConfig | None, generation: GenerationConfig) -> Setting:
        """With what of ``merge`` counts in ``loop``; a schedule of "none" merges nothing."""
        if merge is not None:
            merge = None if merge.schedule == "none" else _counting(merge.in_loop(loop == "cached"), loop)
        return cls(loop, merge, generation)

    @property
    def effective(self) -> MergeConfig:
        """What the loop is given."""
        return NO_MERGE if self.merge is None else self.merge

    @property
    def unmerged(self) -> Setting:
        """The same loop and generation without merging: what retention is measured against."""
        return replace(self, merge=None)

    @property
    def decided(self) -> Setting:
        """The same with the decider tokens selecting, at equal numbers of kept tokens."""
        return self if self.merge is None else replace(self, merge=replace(self.merge, select="decider"))

    def to_json(self) -> dict[str, Any]:
        return {
            "loop": self.loop,
            "merge": None if self.merge is None else self.merge.to_json(),
            "generation": self.generation.to_json(),
        }

    @cached_property
    def id(self) -> str:
        """A hash of all that it says."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def merging(self) -> str:
        """Its merge in words; what is as released is left out."""
        merge = self.merge
        if merge is None:
            return "unmerged"
        words = [f"l* {merge.layer}, ratio {merge.ratio:g} {merge.schedule}, {merge.select}"]
        words += ["at the prefill"] if merge.merge_at == "prefill" else []
        words += ["deciders that look"] if merge.deciders == "looking" else []
        words += ["mean"] if merge.aggregate == "mean" else []
        words += ["original positions"] if merge.positions == "original" else []
        words += [] if merge.cache.remerge == "every-step" else [f"merged {merge.cache.remerge}"]
        words += [] if merge.cache.restore_norm else ["norms not restored"]
        words += [] if merge.cache.text_targets else ["visual targets only"]
        words += [] if merge.keep_multiple == 1 else [f"multiples of {merge.keep_multiple}"]
        return ", ".join(words)

    @property
    def rule(self) -> str:
        """Its commit rule in words."""
        generation = self.generation
        if generation.planned:
            return "plan"
        name = {"threshold": "threshold", "factor": "factor", "frechet": "margin"}[generation.commit]
        return f"{generation.commit} {getattr(generation, name):g}"

    @property
    def label(self) -> str:
        rule = "" if self.generation.planned else f", {self.rule}"
        return f"{self.loop}: {self.merging}{rule}"


def _counting(merge: MergeConfig, loop: Loop) -> MergeConfig:
    """``merge``, as it holds in ``loop``, with what it does not look at as released."""
    if loop == "uncached":
        if merge.select == "decider":
            return merge
        return replace(merge, deciders="committed", aggregate="sum")  # others are not asked, and drop
    if merge.merge_at == "prefill":  # by the answer's masks, once
        return replace(merge, deciders="committed", cache=CacheMergeConfig())
    if merge.schedule == "fixed":
        return replace(merge, cache=replace(merge.cache, adaptive=False))
    return merge


Refusal = Callable[[MergeConfig, Loop], str | None]
"""Why a merge cannot be run in a loop; None where it can."""


def grid(
    loops: Sequence[Loop],
    merges: Iterable[MergeConfig],
    generations: Sequence[GenerationConfig],
    refusal: Refusal,
) -> tuple[list[Setting], list[str]]:
    """Every loop under every generation: unmerged, then with each of ``merges`` that it can do, each once.

    Also returns sentences about what one loop left out that another runs. Raises :class:`D3tomError` for a merge that
    none of the loops can do.
    """
    wanted = [merge for merge in dict.fromkeys(merges) if merge.schedule != "none"]
    reasons = {(loop, merge): refusal(merge, loop) for loop in loops for merge in wanted}
    for merge in wanted:
        refused = [reason for loop in loops if (reason := reasons[loop, merge]) is not None]
        if len(refused) == len(loops):
            raise D3tomError(refused[0])
    found: dict[Setting, None] = {}
    left_out: dict[str, list[str]] = {}
    for loop in loops:
        for generation in generations:
            found[Setting.of(loop, None, generation)] = None
            for merge in wanted:
                reason = reasons[loop, merge]
                if reason is None:
                    found[Setting.of(loop, merge, generation)] = None
                elif merge.select not in left_out.setdefault(f"The {loop} loop leaves out", []):
                    left_out[f"The {loop} loop leaves out"].append(merge.select)
    return list(found), [f"{what} what it cannot do (select {listing(which)})." for what, which in left_out.items()]


def eager_refusal(merge: MergeConfig, loop: Loop) -> str | None:
    """Why the eager model does not run ``merge`` in ``loop``."""
    if loop == "cached":
        try:
            merge.check_cached()
        except D3tomError as error:
            return str(error)
    return None


def graph_refusal(built: MergeConfig) -> Refusal:
    """Why a bundle that was built for ``built`` cannot run a merge: what is part of its graphs cannot vary."""

    def refusal(merge: MergeConfig, loop: Loop) -> str | None:
        if reason := eager_refusal(merge, loop):
            return reason
        fixed: list[tuple[str, object, object]] = [("--layer", built.layer, merge.layer)]
        at_prefill = loop == "cached" and merge.merge_at == "prefill"
        if at_prefill and built.merge_at != "prefill":
            fixed.append(("--merge-at", built.merge_at, merge.merge_at))
        if loop == "uncached":
            same = {built.select, merge.select} <= set(_EXTERNAL)
            fixed += [] if same else [("--select", built.select, merge.select)]
            fixed += [("--positions", built.positions, merge.positions)]
        if at_prefill or (loop == "uncached" and merge.select == "decider"):
            fixed += [("--aggregate", built.aggregate, merge.aggregate)]
        if loop == "cached" and not at_prefill:
            fixed += [("--restore-norm", built.cache.restore_norm, merge.cache.restore_norm)]
            fixed += [("--text-targets", built.cache.text_targets, merge.cache.text_targets)]
        wrong = [f"{option} {mine} and not {wanted}" for option, mine, wanted in fixed if mine != wanted]
        if not wrong:
            return None
        return (
            f"This bundle's graphs are built for {listing(wrong)}: that cannot vary when they run. Add --backend "
            "pytorch, which runs the bundle's weights in eager PyTorch and takes any, or evaluate a checkpoint with "
            "--model."
        )

    return refusal
