"""How many visual tokens are kept at each denoising step (algorithm.md, "Merge ratio schedule").

Known on the host before a step runs, so no graph has a data-dependent shape. Imports no framework.
"""

from __future__ import annotations

from d3tom_export.config import MergeConfig


def merge_ratio(config: MergeConfig, step: int, steps: int) -> float:
    """alpha_t: the share of visual tokens merged away at ``step`` of a block of ``steps`` steps.

    The adaptive ratio falls linearly from 1 towards ``max(0, 2 * ratio - 1)`` and restarts with every block. Its mean
    is ``ratio`` for ratios of at least 0.5; below, the clamp holds it at about 0.5 (a property of the release).
    """
    if config.schedule == "none":
        return 0.0
    if config.schedule == "fixed":
        return config.ratio
    low = min(max(2.0 * config.ratio - 1.0, 0.0), 1.0)
    return low + (1.0 - low) * (1.0 - step / steps)


def kept_tokens(visual_tokens: int, ratio: float, multiple: int = 1) -> int:
    """K = int(V * (1 - alpha_t)) in double precision, as released, but at least one token.

    The release raises an error where K would be 0 (lavida.md E4). ``multiple`` rounds K up to a multiple of itself, or
    to V where that is less (:attr:`MergeConfig.keep_multiple`).
    """
    if not visual_tokens:
        return 0
    keep = max(1, int(visual_tokens * (1.0 - ratio)))
    return min(visual_tokens, -(-keep // multiple) * multiple)


def kept_at_prefill(config: MergeConfig, visual_tokens: int) -> int | None:
    """K of a prompt that is merged once, at its prefill, which may be V; None where it is not merged there.

    ``config`` is what holds in the loop (:meth:`MergeConfig.in_loop`). The ratio is fixed, since there is no step yet.
    """
    if config.merge_at != "prefill" or config.schedule == "none" or not visual_tokens:
        return None
    return kept_tokens(visual_tokens, config.ratio, config.keep_multiple)
