"""Where each word of a description stands: labels that training gives besides the right words.

A description of six things has some forty tokens, and which thing the twentieth is about follows from how many things
stand before it on the picture, and from how long their places' names are. Right words alone teach that slowly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import ANSWER_TOKENS, NO_THING, Asked
from .packed import PackedResult

_FOLLOW_WEIGHT = 0.3
"""Of the loss of what a description's tokens look at, beside that of where things are told of."""


class OrderHead(nn.Linear):
    """Scores of where a description tells of what a visual token shows: (..., D) -> (..., G). Used in training only."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, ANSWER_TOKENS)


def starts_of(asked: Asked) -> Tensor | None:
    """(things,) int64: of each the first token of a description that is about it; None where nothing is described."""
    described = asked.named[(asked.named != NO_THING).any(-1)]
    if not len(described):
        return None
    return torch.stack([(described[0] == thing).long().argmax() for thing in range(int(described[0].max()) + 1)])


def order_loss(head: OrderHead, result: PackedResult, asked: Asked) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of where things are told of, over the visual tokens that show one, and the share of right ones."""
    starts = starts_of(asked)
    if starts is None or result.rows is None:
        return asked.answers.new_zeros((), dtype=torch.float32), {}
    thing = asked.thing if result.kept is None else asked.thing[result.kept]
    shows = thing != NO_THING
    if not shows.any():
        return asked.answers.new_zeros((), dtype=torch.float32), {}
    scores, targets = head(result.rows[shows]).float(), starts[thing[shows]]
    right = (scores.argmax(-1) == targets).float().mean().item()
    return F.cross_entropy(scores, targets), {"order": right}


def follow_loss(result: PackedResult, asked: Asked) -> tuple[Tensor, dict[str, float]]:
    """Minus the logarithm of the share of a description's attention that falls, token by token, on what it is about."""
    told = asked.named != NO_THING
    if result.follow is None or not told.any():
        return asked.answers.new_zeros((), dtype=torch.float32), {}
    looks = result.follow[told]
    on_it = asked.thing == asked.named[told].unsqueeze(-1)
    share = (looks * on_it).sum(-1) / looks.sum(-1).clamp_min(1e-9)
    return -share.clamp_min(1e-4).log().mean(), {"follow": share.mean().item()}


def layout_loss(head: OrderHead, result: PackedResult, asked: Asked) -> tuple[Tensor, dict[str, float]]:
    """Both."""
    order, right = order_loss(head, result, asked)
    follow, share = follow_loss(result, asked)
    return order + _FOLLOW_WEIGHT * follow, right | share
