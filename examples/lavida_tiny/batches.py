"""A scene and its questions as arrays of the exact inference format.

Shapes: N questions, V visual tokens, P prompt tokens before the question (picture included), Q longest question tail,
G answer tokens, R = Q + G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from d3tom_export.config import VisionConfig
from d3tom_export.families.lavida_llada import FAMILY
from d3tom_export.pictures.views import prepare_picture
from d3tom_export.prompt.chat import IMAGE_TOKEN_INDEX, tokenize
from d3tom_export.prompt.conversation import conversation, joined, with_pictures

from .questions import LOCATED, Question
from .scenes import Scene
from .tokenizer import END_OF_TURN, EOS, MASK, special_id
from .views import cells_of, touched

ANSWER_TOKENS = 48
"""G at inference: enough for every description."""
STEP_RATIO = 0.34
"""Denoising steps for each of them: sixteen in all."""
SHORT_ANSWER = 8
"""G of the training steps that ask for no description, which are cheaper."""
_BLOCKS = 4, 16
"""Lengths of the blocks that answers are masked in, from and to."""
NO_THING = -1
NEAR_PADDING = 10
"""Tokens of end-of-text padding behind an answer in whose places another answer might go on: one thing
more, "green 8 at the bottom right, ", takes seven or eight."""


class Text:
    """Questions and answers as ids, in the released chat format."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.mask_id = special_id(tokenizer, MASK)
        self.eos_id = special_id(tokenizer, EOS)
        self.end_of_turn_id = special_id(tokenizer, END_OF_TURN)
        self._split = cache(self._split_uncached)

    def _split_uncached(self, question: str, drop: bool) -> tuple[list[int], list[int]]:
        turns = with_pictures(conversation(question, FAMILY.system), 1)
        text = joined(FAMILY.template, turns)
        ids = tokenize(self.tokenizer, text, bos=FAMILY.bos, drop_token_after_image=drop)
        place = ids.index(IMAGE_TOKEN_INDEX)
        return ids[:place], ids[place + 1 :]

    def head(self) -> list[int]:
        """Ids before the picture."""
        return self._split("", True)[0]

    def tail(self, question: str, drop_token_after_image: bool = True) -> list[int]:
        """Ids after the picture: the question and the header of the answer."""
        return self._split(question, drop_token_after_image)[1]

    def answer(self, text: str, length: int) -> list[int]:
        """The answer's ids, its end of turn, and end-of-text padding: ``length`` ids."""
        ids = [*self.tokenizer.encode(text, add_special_tokens=False).ids, self.end_of_turn_id]
        assert len(ids) <= length, text
        return ids + [self.eos_id] * (length - len(ids))

    def named(self, question: Question, length: int) -> list[int]:
        """Of each of an answer's ``length`` tokens the thing it is about, in reading order, where it describes."""
        things = [NO_THING] * length
        if question.kind == "describe":
            offsets = self.tokenizer.encode(question.answer, add_special_tokens=False).offsets
            things[: len(offsets)] = [question.answer[:start].count(",") for start, _ in offsets]
        return things


@dataclass(frozen=True)
class Asked:
    """A picture with N questions. Tails are padded on the left, which ``valid`` hides."""

    pixel_values: Tensor
    """(views, 3, S, S) float32"""
    packing: Tensor
    """(V,) int64"""
    head_ids: Tensor
    """(prompt ids before the picture,) int64"""
    tail_ids: Tensor
    """(N, Q) int64"""
    valid: Tensor
    """(N, R) bool"""
    answers: Tensor
    """(N, G) int64, the right ones"""
    shown: Tensor
    """(N, V) bool: the visual tokens that show what a question is about, and where, if it or its answer says that"""
    thing: Tensor
    """(V,) int64: which thing, in reading order, each of them shows; :data:`NO_THING` where none"""
    named: Tensor
    """(N, G) int64: which thing each token of a description is about; :data:`NO_THING` elsewhere"""

    @property
    def busy(self) -> Tensor:
        """(V,) bool: the visual tokens that show anything."""
        return self.thing != NO_THING

    @property
    def prefix(self) -> int:
        """P."""
        return len(self.head_ids) + len(self.packing)

    @property
    def positions(self) -> Tensor:
        """(N, R) int64, as if each question followed the picture directly; 0 where nothing is valid."""
        return (self.prefix + self.valid.cumsum(-1) - 1) * self.valid

    def some(self, rows: Sequence[int]) -> Asked:
        """But the questions at ``rows``."""
        picked = {name: getattr(self, name)[list(rows)] for name in ("tail_ids", "valid", "answers", "shown", "named")}
        return replace(self, **picked)


def ask_all(
    text: Text,
    vision: VisionConfig,
    scene: Scene,
    questions: Sequence[Question],
    answer_tokens: int,
    keep_newline: NDArray[np.bool_] | None = None,
) -> Asked:
    """Arrays for ``questions`` about ``scene``; ``keep_newline`` (N,): which keep the token after the picture."""
    views = prepare_picture(Image.fromarray(scene.pixels), vision)
    packing = views.packing.rows[:, 0]
    keep = np.zeros(len(questions), np.bool_) if keep_newline is None else keep_newline
    tails = [text.tail(question.text, not kept) for question, kept in zip(questions, keep, strict=True)]
    longest = max(map(len, tails))
    tail_ids = np.full((len(questions), longest), text.eos_id, np.int64)
    valid = np.ones((len(questions), longest + answer_tokens), np.bool_)
    for row, tail in enumerate(tails):
        tail_ids[row, longest - len(tail) :] = tail
        valid[row, : longest - len(tail)] = False
    height, width, _ = scene.pixels.shape
    cells = cells_of((width, height), vision)
    shown = np.stack([np.append(touched(cells, question.about), False)[packing] for question in questions])
    # Where on the picture a thing is, only the thumbnail tells; its tokens are the first.
    located = [question.kind in LOCATED for question in questions]
    shown[np.ix_(located, packing >= vision.tokens_per_view)] = False
    thing = np.full(len(cells.x) + 1, NO_THING)
    for number, shows in enumerate(scene.things):
        thing[:-1][touched(cells, [shows.box])] = number
    named = [text.named(question, answer_tokens) for question in questions]
    answers = [text.answer(question.answer, answer_tokens) for question in questions]
    return Asked(
        torch.from_numpy(views.pixel_values),
        torch.from_numpy(packing),
        torch.tensor(text.head()),
        torch.from_numpy(tail_ids),
        torch.from_numpy(valid),
        torch.tensor(answers),
        torch.from_numpy(shown),
        torch.from_numpy(thing[packing]),
        torch.tensor(named),
    )


def thinned(rng: np.random.Generator, asked: Asked, share: float) -> Asked:
    """``asked`` with but a random ``share`` of the visual tokens that show nothing, their places closed up."""
    left = asked.busy | torch.from_numpy(rng.random(len(asked.packing)) < share)
    return replace(asked, packing=asked.packing[left], shown=asked.shown[:, left], thing=asked.thing[left])


def hide_answers(rng: np.random.Generator, answers: Tensor, text: Text, in_blocks: float = 0.0) -> Tensor:
    """Which answer tokens (N, G) are masked, each answer at a rate of its own.

    A quarter of the answers are masked as a whole, as at the first step; in another third padding shows from some
    place on, as after a few steps of decoding by confidence; the rest are masked at random. That place is drawn, half
    of the times from the near padding: if it always were where the padding begins, the model would take the token
    before it for the end, wherever it is. At the rate ``in_blocks`` an answer is masked as decoding by blocks leaves
    it instead: it shows up to a place before its end, is masked at random in the block from there, and wholly behind.
    """
    shape = answers.shape
    way = rng.random(shape[0])[:, None]
    rate = rng.uniform(0.1, 1.0, shape[0])[:, None]
    hidden = rng.random(shape) < rate
    order = (answers == text.eos_id).cumsum(-1).numpy()  # 0, then 1, 2, ... along the padding
    padding = order[:, -1:]
    reach = np.where(rng.random(padding.shape) < 0.5, np.minimum(padding, NEAR_PADDING), padding)
    shows = order > np.floor(rng.random(padding.shape) * reach)
    hidden = np.where(way < 0.25, True, np.where(way < 0.58, ~shows & (hidden | (way < 0.42)), hidden))
    if in_blocks:
        place = np.arange(shape[1])
        start = np.floor(rng.random((shape[0], 1)) * (answers != text.eos_id).sum(-1, keepdim=True).numpy())
        behind = place >= start + rng.integers(*_BLOCKS, (shape[0], 1), endpoint=True)
        block = (place >= start) & ((rng.random(shape) < rate) | behind)
        hidden = np.where(rng.random(shape[0])[:, None] < in_blocks, block, hidden)
    # An answer with nothing hidden teaches nothing: hide its first token.
    hidden[:, 0] |= ~hidden.any(-1)
    return torch.from_numpy(hidden)
