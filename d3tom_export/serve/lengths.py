"""How many answer tokens and steps `max_tokens` makes of a bundle's way of generating."""

from __future__ import annotations

from typing import Any

from d3tom_export.config import GenerationConfig


def length_settings(base: GenerationConfig, most: int) -> dict[str, Any]:
    """Settings of the longest answer of at most ``most`` tokens, denoised as ``base`` denoises its own.

    An answer is whole blocks of ``base``'s, or one shorter block. It has as many steps for its tokens as ``base`` has,
    and one at least.
    """
    block = base.block if base.block_length is not None else most
    length = most - most % block if most >= block else most
    block = min(block, length)
    changes: dict[str, Any] = {"gen_length": length}
    if base.planned and base.steps is not None:
        share = base.planned_steps / base.block
        changes["steps"] = max(1, round(share * block)) * (length // block)
        if base.step_ratio is not None:  # both: the times of a plan, cut short
            changes["step_ratio"] = base.step_ratio
    if base.planned and base.step_ratio is not None and int(block * base.step_ratio) < 1:
        return {"gen_length": length, "steps": length // block}
    return changes
