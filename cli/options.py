"""Option groups that several commands take, and how they become configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, get_args

import click

from d3tom_export.config import (
    Aggregation,
    GenerationConfig,
    MergeConfig,
    MergedPositions,
    MergeSchedule,
    Remasking,
    SelectionPolicy,
    StepSchedule,
)

F = TypeVar("F", bound=Callable[..., Any])

BACKENDS = ("auto", "pytorch", "onnxruntime")


def _apply(function: F, options: list[Callable[[F], F]]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def _choice(values: Any) -> click.Choice:
    return click.Choice(get_args(values))


RATIO = click.FloatRange(0, 1, max_open=True)


def merge_options(function: F) -> F:
    """What a bundle is built for. The policy options beyond the release default to the release."""
    return _apply(
        function,
        [
            click.option(
                "--layer",
                type=click.IntRange(min=0),
                default=3,
                show_default="3, as released",
                help="Layer l* in which visual tokens merge, counted from 0.",
            ),
            click.option(
                "--ratio",
                type=RATIO,
                default=0.8,
                show_default="0.8, as released",
                help="Share of visual tokens merged away.",
            ),
            click.option(
                "--schedule",
                type=_choice(MergeSchedule),
                default="adaptive",
                show_default=True,
                help="Ratio over the steps: falling from 1 around --ratio, fixed at it, or no merging.",
            ),
            click.option(
                "--select",
                type=_choice(SelectionPolicy),
                default="decider",
                show_default=True,
                help="Who picks the tokens that stay. Other policies than `decider` drop the rest, for comparison.",
            ),
            click.option(
                "--aggregate",
                type=_choice(Aggregation),
                default="sum",
                show_default=True,
                help="How a kept token takes in the others.",
            ),
            click.option(
                "--positions",
                type=_choice(MergedPositions),
                default="compact",
                show_default=True,
                help="Rotary positions after merging: renumbered from 0, or the original ones.",
            ),
        ],
    )


def merge_override_options(function: F) -> F:
    """What one run may change about a bundle's merging without a rebuild."""
    return _apply(
        function,
        [
            click.option("--ratio", type=RATIO, help="Merge ratio of this run.  [default: the bundle's]"),
            click.option(
                "--schedule", type=_choice(MergeSchedule), help="Ratio schedule of this run.  [default: the bundle's]"
            ),
        ],
    )


def backend_options(function: F) -> F:
    """Which runtime answers the loop, and where it runs."""
    return _apply(
        function,
        [
            click.option(
                "--backend",
                type=click.Choice(BACKENDS),
                default="auto",
                show_default=True,
                help="Runtime; auto takes onnxruntime, pytorch is the oracle itself.",
            ),
            click.option(
                "--device",
                type=click.Choice(["auto", "cpu", "cuda"]),
                default="auto",
                show_default=True,
                help="Device of the onnxruntime backend.",
            ),
        ],
    )


def target_options(function: F) -> F:
    """What kind of stages and engines to build. Further choices come with the backends that run them."""
    return _apply(
        function,
        [
            click.option(
                "--precision",
                type=click.Choice(["fp32"]),
                default="fp32",
                show_default=True,
                expose_value=False,
                help="Precision of the stages.",
            ),
            click.option(
                "--engine",
                type=click.Choice(["none"]),
                default="none",
                show_default=True,
                expose_value=False,
                help="Engines to build from the stages.",
            ),
            click.option(
                "--no-kv-cache",
                is_flag=True,
                expose_value=False,
                help="Build the stages of the uncached loop, the only ones so far.",
            ),
        ],
    )


def generation_options(function: F) -> F:
    """How an answer is denoised; what is not given comes from the bundle."""
    return _apply(
        function,
        [
            click.option("--gen-length", type=click.IntRange(min=1), help="Answer tokens G.  [default: the model's]"),
            click.option("--block-length", type=click.IntRange(min=1), help="Tokens of a block.  [default: all]"),
            click.option(
                "--step-ratio",
                type=click.FloatRange(0, 1, min_open=True),
                help="Steps per block as a share of its tokens.  [default: one step per token]",
            ),
            click.option("--step-schedule", type=_choice(StepSchedule), help="Tokens committed at each step."),
            click.option(
                "--shift",
                type=click.FloatRange(0.001, 1000),
                help="Parameter of --step-schedule shift: 3 as released, 1/3 is the LaViDa paper's best.",
            ),
            click.option("--remasking", type=_choice(Remasking), help="What makes a token confident."),
            click.option(
                "--temperature", type=click.FloatRange(min=0), help="0 takes the likeliest token; above, it samples."
            ),
            click.option("--seed", type=click.IntRange(min=0), help="Seed of all noise.  [default: 0]"),
        ],
    )


def check_device(backend: str, device: str) -> None:
    """Refuse a device that the backend would ignore."""
    if backend == "pytorch" and device == "cuda":
        raise click.UsageError("--device chooses where onnxruntime runs; the pytorch oracle runs on the CPU.")


def generation_from(base: GenerationConfig, options: dict[str, Any]) -> GenerationConfig:
    """``base`` with the generation options that were given (``options`` is emptied of them)."""
    given = {
        field: options.pop(name)
        for name, field in (
            ("gen_length", "gen_length"),
            ("block_length", "block_length"),
            ("step_ratio", "step_ratio"),
            ("step_schedule", "schedule"),
            ("shift", "shift"),
            ("remasking", "remasking"),
            ("temperature", "temperature"),
            ("seed", "seed"),
        )
    }
    return replace(base, **{field: value for field, value in given.items() if value is not None})


def merge_from(base: MergeConfig, ratio: float | None, schedule: str | None) -> MergeConfig:
    """``base`` with this run's ratio and schedule."""
    changes: dict[str, Any] = {"ratio": ratio, "schedule": schedule}
    return replace(base, **{name: value for name, value in changes.items() if value is not None})
