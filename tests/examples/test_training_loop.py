"""Training resumes as if it had never stopped, and more threads change no gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from examples.lavida_tiny import loop
from examples.lavida_tiny.loop import Part, Run, run_phase


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


class _Phase:
    name, number, steps, learning_rate, evaluate_every, parts = "net", 1, 6, 1e-2, 6, 4

    def __init__(self, model: _Net, stop_at: int | None = None) -> None:
        self.model, self.stop_at = model, stop_at

    def trains(self, name: str) -> bool:
        return not name.startswith("heads.")

    def part(self, rng: np.random.Generator, progress: float, place: int) -> Part:
        if self.stop_at is not None and progress * self.steps >= self.stop_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.normal(size=(8, 6)).astype(np.float32))
        return Part((self.model(x) - x.sum(-1, keepdim=True) * (1 + place)).square().mean(), {"place": float(place)})

    def evaluate(self) -> dict[str, float]:
        return {}


def _train(folder: Path, threads: int = 2, stop_at: int | None = None, *, resume: bool = False) -> dict[str, Tensor]:
    model = _Net()
    folder.mkdir(exist_ok=True)
    run_phase(
        Run(model, nn.ModuleDict(), 5, folder, threads),
        _Phase(model, stop_at),
        resume=resume,
        publish=lambda phase: None,
    )
    return model.state_dict()


def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_SAVE_EVERY", 2)
    whole = _train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "cut", stop_at=5)
    resumed = _train(tmp_path / "cut", resume=True)
    untrained = _Net().state_dict()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
        assert not torch.equal(value, untrained[name]), name


def test_threads_change_no_gradient(tmp_path: Path) -> None:
    one, four = _train(tmp_path / "one", threads=1), _train(tmp_path / "four", threads=4)
    assert all(torch.equal(value, four[name]) for name, value in one.items())
