"""The training loop shared by all phases: optimisers, schedule, logging, and checkpoints that resume exactly.

A step is made of parts, pictures of its own each, whose gradients are taken side by side, one thread a part, and summed
in order. Each part draws its data from a generator seeded by (seed, phase, step, part), so a resumed run sees the same
data as one that was never interrupted.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

LOG = logging.getLogger("lavida_tiny")

_LOG_EVERY = 50
_SAVE_EVERY = 100


class Part(NamedTuple):
    """A part of a step, whose gradients are taken alone."""

    loss: Tensor
    stats: dict[str, float]
    """Numbers worth logging."""


class Phase(Protocol):
    """One stage of training."""

    name: str
    number: int
    steps: int
    learning_rate: float
    evaluate_every: int
    parts: int
    """How many a step has; they weigh alike."""

    def trains(self, name: str) -> bool:
        """Whether this phase trains the parameter of this name (``heads.`` leads those of :attr:`Run.heads`)."""
        ...

    def part(self, rng: np.random.Generator, progress: float, place: int) -> Part:
        """The part of a step at ``place``; ``progress`` runs from 0 to 1 over the phase."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Measurements on held-out digits."""
        ...


@dataclass(frozen=True)
class Run:
    """What is being trained and where its checkpoints go."""

    model: nn.Module
    heads: nn.Module
    """Layers that only training needs; not part of the released checkpoint."""
    seed: int
    folder: Path
    threads: int = 2
    """How many parts are worked on at a time."""

    def state_file(self, phase: Phase) -> Path:
        return self.folder / f"{phase.number}-{phase.name}.pt"


def make_optimisers(parameters: dict[str, nn.Parameter], learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for tables, heads, norms and biases.

    Muon's update is scaled to the size of AdamW's, so both take the same learning rate.
    """
    matrices, others = [], []
    for name, parameter in parameters.items():
        inner = "blocks." in name or "encoder.layers." in name or "mm_projector." in name
        (matrices if inner and parameter.dim() == 2 else others).append(parameter)
    return [
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]


def schedule(step: int, steps: int, warm_up: int = 50) -> float:
    """Linear warm-up, then a cosine down to 2 percent."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def _save(run: Run, phase: Phase, step: int, optimisers: list[torch.optim.Optimizer]) -> None:
    target = run.state_file(phase)
    partial = target.with_suffix(".partial")
    torch.save(
        {
            "step": step,
            "model": run.model.state_dict(),
            "heads": run.heads.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        },
        partial,
    )
    partial.replace(target)


def _format(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _gradients(run: Run, phase: Phase, step: int, parameters: Sequence[nn.Parameter]) -> dict[str, list[float]]:
    """Set the gradients of a step on ``parameters``, and return what its parts log."""

    def work(place: int) -> tuple[dict[str, float], tuple[Tensor | None, ...]]:
        part = phase.part(np.random.default_rng([run.seed, phase.number, step, place]), step / phase.steps, place)
        gradients = torch.autograd.grad(part.loss, parameters, allow_unused=True)
        return {"loss": part.loss.item(), **part.stats}, gradients

    values: dict[str, list[float]] = defaultdict(list)
    with ThreadPoolExecutor(run.threads) as pool:
        for stats, gradients in pool.map(work, range(phase.parts)):
            for name, value in stats.items():
                values[name].append(value)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    share = gradient / phase.parts
                    parameter.grad = share if parameter.grad is None else parameter.grad + share
    return values


def run_phase(run: Run, phase: Phase, resume: bool, publish: Callable[[Phase], None]) -> None:
    """Train ``phase`` to its end, from its last checkpoint if ``resume`` and there is one.

    ``publish`` is called after every evaluation, so that a usable model exists long before the last one.
    """
    parameters = dict(run.model.named_parameters()) | {
        f"heads.{name}": parameter for name, parameter in run.heads.named_parameters()
    }
    for name, parameter in parameters.items():
        parameter.requires_grad_(phase.trains(name))
    trained = {name: parameter for name, parameter in parameters.items() if phase.trains(name)}
    optimisers = make_optimisers(trained, phase.learning_rate)
    first = 0
    if resume and run.state_file(phase).exists():
        state = torch.load(run.state_file(phase), weights_only=True)
        run.model.load_state_dict(state["model"])
        run.heads.load_state_dict(state["heads"])
        first = state["step"]
        if first < phase.steps:
            for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
    if first >= phase.steps:
        LOG.info("%s: done before", phase.name)
        return
    LOG.info(
        "%s: steps %d to %d, %d parameters",
        phase.name,
        first,
        phase.steps,
        sum(parameter.numel() for parameter in trained.values()),
    )
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    since, started = first, time.monotonic()
    for step in range(first, phase.steps):
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = phase.learning_rate * schedule(step, phase.steps)
        values = _gradients(run, phase, step, list(trained.values()))
        norm = nn.utils.clip_grad_norm_(trained.values(), 1.0).item()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        for name, numbers in {**values, "norm": [norm]}.items():
            sums[name] += sum(numbers)
            counts[name] += len(numbers)
        done = step + 1
        if done % _LOG_EVERY == 0 or done == phase.steps:
            means = {name: value / counts[name] for name, value in sums.items()}
            pace = (time.monotonic() - started) / (done - since)
            LOG.info("%s %5d  %s  %.2f s/step", phase.name, done, _format(means), pace)
            sums.clear()
            counts.clear()
            since, started = done, time.monotonic()
        if done % _SAVE_EVERY == 0 or done == phase.steps:
            _save(run, phase, done, optimisers)
        if done % phase.evaluate_every == 0 or done == phase.steps:
            LOG.info("%s %5d  held out: %s", phase.name, done, _format(phase.evaluate()))
            publish(phase)
            since, started = done, time.monotonic()
            sums.clear()
            counts.clear()
