"""Watching a stage run: the calls in order, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from d3tom_export.config import MergeConfig
from d3tom_export.diagnosis.trail import INPUT, OUTPUT, Point, walk
from d3tom_export.model.lavida import Lavida
from d3tom_export.stages.cut import stage_modules

BLOCK = ["attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"]


@pytest.fixture
def stages(eager_model: Lavida) -> dict[str, Any]:
    return stage_modules(eager_model, MergeConfig(layer=1, ratio=0.7), ["uncached"])


def _arguments(stage: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 20, 32, generator=generator)
    if stage == "front":
        return [hidden[:, :14], hidden[:, 14:]]
    return [hidden, torch.ones(1, 6, dtype=torch.bool), torch.arange(2, 12), torch.tensor([4])]


def test_calls_are_seen_in_order_with_what_passes_through(stages: dict[str, Any]) -> None:
    seen: list[tuple[Point, list[tuple[int, ...]]]] = []
    scopes, outputs = walk(
        stages["merge"], _arguments("merge"), lambda point, tensors: seen.append((point, [*map(_shape, tensors)]))
    )
    assert scopes == [*(f"block.{name}" for name in BLOCK[:5]), "D3ToMMerge", *(f"block.{name}" for name in BLOCK[5:])]
    assert [point for point, _ in seen] == [Point(call, side) for call in range(10) for side in (INPUT, OUTPUT)]
    shown = dict(seen)
    assert shown[Point(2, OUTPUT)] == [(1, 20, 16)]  # k_proj, two key heads
    assert shown[Point(5, INPUT)] == [(1, 10, 32), (1, 10, 32), (1, 4)]
    assert shown[Point(5, OUTPUT)] == [(1, 4, 32)]
    assert [_shape(tensor) for tensor in outputs] == [(1, 14, 32), (1, 4)]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def test_a_merge_goes_where_it_is_told(stages: dict[str, Any]) -> None:
    arguments = _arguments("merge")
    nearest = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    merged: list[Tensor] = []

    def see(point: Point, tensors: Any) -> None:
        if point == Point(5, INPUT):
            merged.append(tensors[0].sum(dim=1))
        if point == Point(5, OUTPUT):
            merged.append(tensors[0])

    walk(stages["merge"], arguments, see, [nearest])
    assert torch.allclose(merged[0], merged[1][:, 0], atol=1e-5)
    assert not merged[1][:, 1:].any()


def test_no_hook_stays_behind_even_after_an_error(stages: dict[str, Any]) -> None:
    def refuse(point: Point, tensors: Any) -> None:
        raise KeyError(point)

    with pytest.raises(KeyError):
        walk(stages["front"], _arguments("front"), refuse)
    for module in stages["front"].modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
