"""Phase 1: the tower and projector learn to see, from a label for every pooled token of crowded scenes' views."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from d3tom_export.model.lavida import Lavida
from d3tom_export.pictures.views import prepare_picture

from .digits import DigitBank
from .loop import Part
from .scenes import CANVAS, LONG_SIZES, NATIVE_SIZE, Scene, make_scene, random_size
from .views import BACKGROUND, IGNORED, KINDS, NO_COLOUR, ON_TILE, Labels, label_cells

_SIZES = Labels(BACKGROUND + 1, NO_COLOUR + 1, ON_TILE + 1, ON_TILE + 1)
"""Classes of each label."""
_WEIGHTS = Labels(1.0, 0.5, 0.2, 0.2)
"""Of their losses: what a thing is matters most; where it is saves the language model from counting tokens."""
_NOTHING = 0.3
"""Weight of the plentiful background among kinds and colours."""
_GRIDS, _GRID_SHARES = (3, 4, 5, 6), (0.15, 0.15, 0.3, 0.4)
_FULLEST, _EMPTIEST = 0.85, 0.45
"""A picture has so many places a side, at these rates, and a share between these of them filled: more things than there
are in questions, so that one picture teaches much, but not always: a tower that has seen nothing but crowds reads a
quarter of the digits wrong where there are few. Places of several sizes, so that edges of tiles cut things too."""


class DenseHead(nn.Linear):
    """Scores of a pooled token's labels: (..., D) -> (..., 17 + 7 + 4 + 4). Used in training only."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, sum(_SIZES))


def dense_loss(scores: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """Weighted cross entropies of scores (N, 32) against a tensor (N,) of each label."""
    total = scores.new_zeros((), dtype=torch.float32)
    for part, label, weight, nothing in zip(
        scores.float().split(list(_SIZES), dim=-1),
        labels,
        _WEIGHTS,
        (BACKGROUND, NO_COLOUR, None, None),
        strict=True,
    ):
        classes = torch.ones(part.shape[-1])
        if nothing is not None:
            classes[nothing] = _NOTHING
        total = total + weight * F.cross_entropy(part, label, weight=classes, ignore_index=IGNORED)
    return total


def dense_parts(model: Lavida, scene: Scene) -> tuple[Tensor, list[Tensor]]:
    """Views (views, 3, S, S) of ``scene`` and the labels of its tokens, (views * T,) each."""
    assert model.config.vision is not None
    views = prepare_picture(Image.fromarray(scene.pixels), model.config.vision).pixel_values
    return torch.from_numpy(views), [torch.from_numpy(label) for label in label_cells(scene, model.config.vision)]


class DensePhase:
    """See the module's docstring; the protocol is :class:`loop.Phase`."""

    name, number = "dense", 1
    evaluate_every = 300

    def __init__(self, model: Lavida, head: DenseHead, steps: int, parts: int = 4, learning_rate: float = 3e-3) -> None:
        self.model, self.head = model, head
        self.steps, self.parts, self.learning_rate = steps, parts, learning_rate
        self.bank = DigitBank.load(held_out=False)
        rng, held_out = np.random.default_rng(0), DigitBank.load(held_out=True)
        self.held_out = [dense_parts(model, make_scene(rng, held_out, random_size(rng))) for _ in range(40)]

    @staticmethod
    def _crowd(rng: np.random.Generator, bank: DigitBank) -> Scene:
        side = int(rng.choice(_GRIDS, p=_GRID_SHARES))
        # One in six is long: two tiles in place of four, the thumbnail squeezed.
        size = NATIVE_SIZE if rng.random() < 0.85 else LONG_SIZES[int(rng.integers(2))]
        grid = max(1, side * size[0] // CANVAS), max(1, side * size[1] // CANVAS)
        things = max(1, round(grid[0] * grid[1] * rng.uniform(_EMPTIEST, _FULLEST)))
        return make_scene(rng, bank, size, things, grid)

    def trains(self, name: str) -> bool:
        return name.startswith(("model.vision_tower.", "model.mm_projector.", "heads.dense."))

    def part(self, rng: np.random.Generator, progress: float, place: int) -> Part:
        views, labels = dense_parts(self.model, self._crowd(rng, self.bank))
        with torch.autocast("cpu", torch.bfloat16):
            scores = self.head(self.model.encode_views(views))
        return Part(dense_loss(scores.flatten(0, 1), labels), {})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        right: dict[str, int] = defaultdict(int)
        asked: dict[str, int] = defaultdict(int)
        for views, labels in self.held_out:
            with torch.autocast("cpu", torch.bfloat16):
                scores = self.head(self.model.encode_views(views)).flatten(0, 1)
            said = [part.argmax(-1) for part in scores.split(list(_SIZES), dim=-1)]
            kinds, colours = labels[0], labels[1]
            shown = (kinds >= 0) & (kinds != BACKGROUND)
            digit = kinds < KINDS.index("circle")
            assert self.model.config.vision is not None
            thumbnail = torch.arange(len(kinds)) < self.model.config.vision.tokens_per_view
            groups = {
                "digits": (shown & digit & thumbnail, said[0], kinds),
                "on tiles": (shown & digit & ~thumbnail, said[0], kinds),
                "shapes": (shown & ~digit, said[0], kinds),
                "colours": (shown, said[1], colours),
                "background": (kinds == BACKGROUND, said[0], kinds),
                "rows": (shown, said[2], labels[2]),
            }
            for name, (where, answer, meant) in groups.items():
                right[name] += int((answer == meant)[where].sum())
                asked[name] += int(where.sum())
        return {name: right[name] / asked[name] for name in right}
