"""How many tokens each denoising step commits (algorithm.md, "Denoising"; lavida.md D5).

Computed in float32 as released: truncation makes single bits matter. Imports no framework but NumPy.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import GenerationConfig, StepSchedule

Float32 = NDArray[np.float32]


VANILLA_EPSILON = 1e-3
"""The time at which Dream's own plan ends; it begins at 1."""


def _ramp(start: float, end: float, steps: int) -> Float32:
    """``steps + 1`` float32 points from ``start`` to ``end``, bit for bit those of ``torch.linspace``.

    torch counts the upper half down from the end and fuses product and difference, so the product must not be rounded
    by itself: float64 holds it exactly.
    """
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(steps))
    index = np.arange(steps + 1)
    up, down = np.float64(first) + step * index, np.float64(last) - step * (steps - index)
    return np.where(index < (steps + 1) // 2, up, down).astype(np.float32)


def _unit_ramp(steps: int) -> Float32:
    return _ramp(0.0, 1.0, steps)


def _normal_cdf_of_logit(u: Float32) -> Float32:
    with np.errstate(divide="ignore"):
        z = np.log(u / (np.float32(1.0) - u)) / np.float32(math.sqrt(2.0))
    erf = np.array([math.erf(float(x)) for x in z], dtype=np.float32)
    return np.float32(0.5) * (np.float32(1.0) + erf)


def committed_share(schedule: StepSchedule, steps: int, shift: float) -> Float32:
    """Share of a block's tokens after each of ``steps`` steps, before the release reverses their order: (steps+1,)."""
    u = _unit_ramp(steps)
    if schedule == "shift":
        return (np.float32(shift) * u / (np.float32(1.0) + np.float32(shift - 1.0) * u)).astype(np.float32)
    if schedule == "cosine":
        return (np.float32(1.0) - np.float32(0.5) * (np.float32(1.0) + np.cos(np.float32(np.pi) * u))).astype(
            np.float32
        )
    if schedule == "logit_normal":
        return _normal_cdf_of_logit(u)
    return u


def tokens_per_step(schedule: StepSchedule, masked: int, steps: int, shift: float = 3.0) -> NDArray[np.int64]:
    """Tokens to commit at each step: int64, positive where ``masked`` allows, summing to ``masked``.

    "none" spreads evenly with the remainder first. The others have ``min(steps, masked)`` steps, commit at least one
    token at each and are reversed at the end, so their large steps come last.

    With some shifts (0.05, 0.1, 0.35, ...) the share ends just below 1 in float32, so that the block's last token
    belongs to no step. Where steps raised to one token make up for it, the plan is the release's; where they do not,
    the release stops at an assertion, and we give that token to the last step before the plan is reversed.
    """
    if schedule == "none":
        plan = np.full(steps, masked // steps, dtype=np.int64)
        plan[: masked % steps] += 1
        return plan
    steps = min(steps, masked)
    reached = (committed_share(schedule, steps, shift) * np.float32(masked)).astype(np.int64)
    plan = np.maximum(np.diff(reached), 1)
    if plan.sum() < masked:
        reached[-1] = masked
        plan = np.maximum(np.diff(reached), 1)
    surplus, step = int(plan.sum()) - masked, 0
    while surplus > 0:
        if plan[step % steps] > 1:
            plan[step % steps] -= 1
            surplus -= 1
        step += 1
    return plan[::-1].copy()


def vanilla_share(steps: int) -> Float32:
    """Share of what is still masked that each step of Dream's own plan commits: (steps,) float32.

    1 - t[i+1] / t[i] over times laid out evenly from 1 to :data:`VANILLA_EPSILON` (spec-lavida-dream.md, 6).
    """
    times = _ramp(1.0, VANILLA_EPSILON, steps)
    return (np.float32(1.0) - times[1:] / times[:-1]).astype(np.float32)


def block_plan(generation: GenerationConfig, masked: int | None = None) -> NDArray[np.int64]:
    """How many tokens each step of a block commits, ``masked`` of whose positions are masks (None: all): (steps,).

    The plan of "vanilla" follows from what is still masked at each step, and its last step commits all of that. Times
    are laid out for the steps that were asked for, though ``step_ratio`` may end the block before the last of them.
    Others have at most one step for each mask.
    """
    masked = generation.block if masked is None else masked
    steps = generation.steps_per_block
    if masked == 0:
        return np.zeros(0, dtype=np.int64)
    if generation.schedule != "vanilla":
        return tokens_per_step(generation.schedule, masked, steps, generation.shift)
    share, plan, left = vanilla_share(generation.planned_steps), np.zeros(steps, dtype=np.int64), masked
    for step in range(steps):
        plan[step] = int(np.float32(left) * share[step]) if step < steps - 1 else left
        left -= int(plan[step])
    return plan
