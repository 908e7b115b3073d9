"""Phase 1: the tower and projector learn to see, from a label for every pooled token of crowded scenes' views."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from d3tom_export.model.lavida import Lavida
from d3tom_export.pictures.views import prepare_picture

from .digits import DigitBank
from .loop import Part
from .scenes import CANVAS, LONG_SIZES, NATIVE_SIZE, Scene, make_scene
from .views import BACKGROUND, IGNORED, KINDS, NO_COLOUR, label_cells

_BACKGROUND_WEIGHT = 0.3
_COLOUR_WEIGHT = 0.5
_CROWD, _GRID = 30, (6, 6)
"""Things on a picture and its places: many, so that one teaches much."""


class DenseHead(nn.Linear):
    """Scores of a pooled token's kind and colour: (..., D) -> (..., 17 + 7). Used in training only."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, BACKGROUND + 1 + NO_COLOUR + 1)


def dense_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of (N, 17 + 7) scores against (2, N) labels, the plentiful background weighing less."""
    total = scores.new_zeros((), dtype=torch.float32)
    parts = scores.float().split([BACKGROUND + 1, NO_COLOUR + 1], dim=-1)
    for part, label, nothing, share in zip(parts, labels, (BACKGROUND, NO_COLOUR), (1.0, _COLOUR_WEIGHT), strict=True):
        weight = torch.ones(nothing + 1)
        weight[nothing] = _BACKGROUND_WEIGHT
        total = total + share * F.cross_entropy(part, label, weight=weight, ignore_index=IGNORED)
    return total


def dense_parts(model: Lavida, scene: Scene) -> tuple[Tensor, Tensor]:
    """Views (views, 3, S, S) of ``scene`` and its labels (2, views * T)."""
    assert model.config.vision is not None
    views = prepare_picture(Image.fromarray(scene.pixels), model.config.vision).pixel_values
    return torch.from_numpy(views), torch.from_numpy(label_cells(scene, model.config.vision))


class DensePhase:
    """See the module's docstring; the protocol is :class:`loop.Phase`."""

    name, number = "dense", 1
    evaluate_every = 300

    def __init__(self, model: Lavida, head: DenseHead, steps: int, parts: int = 4, learning_rate: float = 3e-3) -> None:
        self.model, self.head = model, head
        self.steps, self.parts, self.learning_rate = steps, parts, learning_rate
        self.bank = DigitBank.load(held_out=False)
        rng, held_out = np.random.default_rng(0), DigitBank.load(held_out=True)
        self.held_out = [dense_parts(model, self._crowd(rng, held_out)) for _ in range(12)]

    @staticmethod
    def _crowd(rng: np.random.Generator, bank: DigitBank) -> Scene:
        if rng.random() < 0.15:  # two views of three, the thumbnail squeezed
            size = LONG_SIZES[int(rng.integers(2))]
            return make_scene(
                rng, bank, size, _CROWD // 2, (_GRID[0] * size[0] // CANVAS, _GRID[1] * size[1] // CANVAS)
            )
        return make_scene(rng, bank, NATIVE_SIZE, _CROWD, _GRID)

    def trains(self, name: str) -> bool:
        return name.startswith(("model.vision_tower.", "model.mm_projector.", "heads."))

    def part(self, rng: np.random.Generator, progress: float, place: int) -> Part:
        views, labels = dense_parts(self.model, self._crowd(rng, self.bank))
        with torch.autocast("cpu", torch.bfloat16):
            scores = self.head(self.model.encode_views(views))
        return Part(dense_loss(scores.flatten(0, 1), labels), {})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        right = dict.fromkeys(("digits", "shapes", "colours", "background"), 0)
        asked = dict(right)
        for views, labels in self.held_out:
            with torch.autocast("cpu", torch.bfloat16):
                scores = self.head(self.model.encode_views(views)).flatten(0, 1)
            kinds, colours = (part.argmax(-1) for part in scores.split([BACKGROUND + 1, NO_COLOUR + 1], dim=-1))
            shown = (labels[0] >= 0) & (labels[0] != BACKGROUND)
            groups = {
                "digits": (shown & (labels[0] < KINDS.index("circle")), kinds, labels[0]),
                "shapes": (shown & (labels[0] >= KINDS.index("circle")), kinds, labels[0]),
                "colours": (shown, colours, labels[1]),
                "background": (labels[0] == BACKGROUND, kinds, labels[0]),
            }
            for name, (where, said, meant) in groups.items():
                right[name] += int((said == meant)[where].sum())
                asked[name] += int(where.sum())
        return {name: right[name] / asked[name] for name in right}
