"""Phase 1: the tower and projector learn to see, from a label for every pooled token of single views."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from d3tom_export.model.lavida import Lavida

from .digits import DigitBank
from .views import BACKGROUND, IGNORED, make_views

CLASSES = BACKGROUND + 1
_BACKGROUND_WEIGHT = 0.3


class DenseHead(nn.Linear):
    """Class scores of a pooled token: (..., D) -> (..., 11). Used in training only."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, CLASSES)


def to_pixel_values(views: NDArray[np.uint8]) -> Tensor:
    """SigLIP's normalisation: (N, S, S, 3) uint8 -> (N, 3, S, S) float32 in -1..1."""
    return torch.from_numpy(views).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)


def dense_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of (N, T, 11) scores against (N, T) labels, the plentiful background weighing less."""
    weight = torch.ones(CLASSES)
    weight[BACKGROUND] = _BACKGROUND_WEIGHT
    return F.cross_entropy(scores.float().flatten(0, 1), labels.flatten(), weight=weight, ignore_index=IGNORED)


class DensePhase:
    """See the module's docstring; the protocol is :class:`loop.Phase`."""

    name, number = "dense", 1
    evaluate_every = 250

    def __init__(
        self, model: Lavida, head: DenseHead, steps: int, batch: int = 64, learning_rate: float = 3e-3
    ) -> None:
        self.model, self.head = model, head
        self.steps, self.batch, self.learning_rate = steps, batch, learning_rate
        self.bank = DigitBank.load(held_out=False)
        views, labels = make_views(np.random.default_rng(0), DigitBank.load(held_out=True), 256)
        self.held_out = to_pixel_values(views), torch.from_numpy(labels)

    def trains(self, name: str) -> bool:
        return name.startswith(("model.vision_tower.", "model.mm_projector.", "heads."))

    def loss(self, rng: np.random.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        views, labels = make_views(rng, self.bank, self.batch)
        with torch.autocast("cpu", torch.bfloat16):
            scores = self.head(self.model.encode_views(to_pixel_values(views)))
        return dense_loss(scores, torch.from_numpy(labels)), {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        pixel_values, labels = self.held_out
        with torch.autocast("cpu", torch.bfloat16):
            right = self.head(self.model.encode_views(pixel_values)).argmax(-1) == labels
        digits = (labels != BACKGROUND) & (labels != IGNORED)
        return {
            "digit cells": right[digits].float().mean().item(),
            "background": right[labels == BACKGROUND].float().mean().item(),
        }
