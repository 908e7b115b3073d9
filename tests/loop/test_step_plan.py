"""Token allocation per step: the vectors printed by the original code, torch's float32, and invariants."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from d3tom_export.config import GenerationConfig, StepSchedule
from d3tom_export.loop.step_plan import VANILLA_EPSILON, block_plan, tokens_per_step, vanilla_share

SCHEDULES = [each for each in get_args(StepSchedule) if each != "vanilla"]

# lavida.md D5: printed by the original code.
ORIGINAL = [
    ("shift", 32, 16, 3.0, "1 1 1 1 1 1 1 1 2 2 2 2 3 4 4 5"),
    ("shift", 32, 16, 1 / 3, "6 4 4 2 3 2 2 1 1 1 1 1 1 1 1 1"),
    ("shift", 32, 16, 0.33, "6 4 4 3 2 2 2 1 1 1 1 1 1 1 1 1"),
    ("cosine", 32, 16, 3.0, "1 1 1 2 3 2 3 3 4 3 2 3 1 1 1 1"),
    ("logit_normal", 32, 16, 3.0, "1 1 2 2 2 3 3 3 4 3 3 1 1 1 1 1"),
    ("none", 32, 16, 3.0, "2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2"),
    ("shift", 64, 32, 3.0, "1 1 1 1 1 1 1 1 1 1 1 1 1 2 1 1 2 2 1 2 2 3 2 2 3 3 4 3 4 5 5 4"),
    ("shift", 32, 8, 3.0, "2 2 2 2 4 4 7 9"),
    ("shift", 32, 8, 1 / 3, "10 6 5 3 3 2 2 1"),
    ("shift", 10, 4, 3.0, "1 2 2 5"),
    ("shift", 10, 4, 1 / 3, "5 3 1 1"),
    ("linear", 10, 4, 3.0, "3 2 3 2"),
    ("none", 10, 4, 3.0, "3 3 2 2"),
]


@pytest.mark.parametrize(("schedule", "masked", "steps", "shift", "expected"), ORIGINAL)
def test_matches_the_original_code(schedule: str, masked: int, steps: int, shift: float, expected: str) -> None:
    plan = tokens_per_step(schedule, masked, steps, shift)  # type: ignore[arg-type]
    assert " ".join(map(str, plan)) == expected


@given(
    schedule=st.sampled_from(SCHEDULES),
    masked=st.integers(1, 300),
    steps=st.integers(1, 300),
    shift=st.floats(0.001, 1000),
)
def test_commits_every_token_exactly_once(schedule: StepSchedule, masked: int, steps: int, shift: float) -> None:
    plan = tokens_per_step(schedule, masked, steps, shift)
    assert plan.sum() == masked
    if schedule == "none":
        assert len(plan) == steps
        assert plan.max() - plan.min() <= 1
    else:
        assert len(plan) == min(steps, masked)
        assert plan.min() >= 1


def _plan_in_torch(schedule: str, masked: int, steps: int, shift: float) -> list[int]:
    """The same plan with torch's own float32 functions: truncation turns one wrong bit into another plan."""
    steps = min(steps, masked)
    u = torch.linspace(0, 1, steps + 1)
    share = {
        "shift": shift * u / (1 + (shift - 1) * u),
        "cosine": 1 - 0.5 * (1 + torch.cos(torch.pi * u)),
        "logit_normal": 0.5 * (1 + torch.erf(torch.logit(u) / 2**0.5)),
        "linear": u,
    }[schedule]
    plan = torch.diff((share * masked).to(torch.int64)).clamp(min=1).tolist()
    surplus, step = sum(plan) - masked, 0
    while surplus > 0:
        if plan[step % steps] > 1:
            plan[step % steps] -= 1
            surplus -= 1
        step += 1
    return plan[::-1]


@pytest.mark.parametrize(
    ("schedule", "tolerated"),
    # logit and erf differ from torch's in their last bit, which a truncation at an integer turns into another plan.
    [("shift", 0.0), ("linear", 0.0), ("cosine", 0.0), ("logit_normal", 0.01)],
)
def test_plans_agree_with_torch(schedule: StepSchedule, tolerated: float) -> None:
    cases = [(masked, steps) for masked in (8, 16, 32, 64, 128, 256) for steps in range(1, masked + 1)]
    differing = [
        (masked, steps)
        for masked, steps in cases
        if tokens_per_step(schedule, masked, steps).tolist() != _plan_in_torch(schedule, masked, steps, 3.0)
    ]
    assert len(differing) <= tolerated * len(cases), differing


def test_block_plan_scales_steps_to_the_block() -> None:
    generation = GenerationConfig(gen_length=32, block_length=16, step_ratio=0.5)
    assert generation.steps_per_block == 8
    assert np.array_equal(block_plan(generation), np.full(8, 2))


def _released_plan(masked: int, steps: int, shift: float) -> list[int] | None:
    """LaViDa's allocation under "shift" (lavida.md D5) in torch; None where its assertion stops it."""
    steps = min(steps, masked)
    u = torch.linspace(0, 1, steps + 1)
    share = shift * u / (1 + (shift - 1) * u)
    plan = torch.diff((share * masked).to(torch.int64)).clamp(min=1)
    surplus, step = int(plan.sum()) - masked, 0
    if surplus < 0:
        return None
    while surplus > 0:
        step %= steps
        if plan[step] > 1:
            plan[step] -= 1
            surplus -= 1
        step += 1
    return plan.flip(0).tolist()


@pytest.mark.parametrize(
    ("shift", "stopped"),
    # How many of the 2,080 plans of up to 64 tokens the release does not finish: its ramp ends below 1.
    [(0.05, 135), (0.1, 237), (0.35, 738), (0.01, 0), (0.33, 0), (1 / 3, 0), (0.7, 0), (3.0, 0), (1000.0, 0)],
)
def test_every_plan_is_the_releases_and_where_it_stops_whole(shift: float, stopped: int) -> None:
    mended = 0
    for masked in range(1, 65):
        for steps in range(1, masked + 1):
            plan, released = (
                tokens_per_step("shift", masked, steps, shift).tolist(),
                _released_plan(masked, steps, shift),
            )
            if released is not None:
                assert plan == released, (masked, steps)
                continue
            mended += 1
            assert sum(plan) == masked, (masked, steps)
            assert min(plan) >= 1, (masked, steps)
    assert mended == stopped


# spec-lavida-dream.md, 6, and the `committed` of golden-families/lavida-dream: printed by the original code.
@pytest.mark.parametrize(
    ("length", "settings", "expected"),
    [
        (16, {}, [0, *[1] * 14, 2]),
        (32, {}, [0, *[1] * 30, 2]),
        (32, {"steps": 16}, [1, *[2] * 14, 3]),
        (128, {"steps": 64}, [1, *[2] * 62, 3]),
        (16, {"steps": 6}, [2, 2, 2, 3, 3, 4]),
        (16, {"steps": 64}, [0, *[1] * 14, 2]),
        (16, {"step_ratio": 0.5, "steps": 512}, [0, 1, 1, 1, 1, 1, 1, 10]),
    ],
)
def test_dreams_own_plan(length: int, settings: dict, expected: list[int]) -> None:
    generation = GenerationConfig(gen_length=length, schedule="vanilla", **settings)
    assert block_plan(generation).tolist() == expected


@given(steps=st.integers(1, 600))
def test_its_times_are_torchs(steps: int) -> None:
    times = torch.linspace(1, VANILLA_EPSILON, steps + 1)
    assert np.array_equal(vanilla_share(steps), (1 - times[1:] / times[:-1]).numpy())


@given(length=st.integers(1, 200), steps=st.integers(1, 200), masked=st.integers(0, 200), ratio=st.floats(0.01, 1))
def test_it_commits_all_that_is_masked(length: int, steps: int, masked: int, ratio: float) -> None:
    assume(masked <= length and int(length * ratio) >= 1)
    generation = GenerationConfig(gen_length=length, steps=steps, step_ratio=ratio, schedule="vanilla")
    plan = block_plan(generation, masked)
    assert plan.sum() == masked
    assert (plan >= 0).all()


def test_a_plan_is_of_what_is_masked() -> None:
    """With a row shift and a KV cache the first slot is filled before the first step."""
    generation = GenerationConfig(gen_length=16, schedule="shift", shift=0.33)
    assert block_plan(generation, 15).tolist() == [1] * 15
    assert block_plan(generation, 0).tolist() == []
