"""Scenes and questions as arrays of the exact inference format, several questions to a picture.

Shapes: B scenes, N questions per scene, V visual tokens, P prompt tokens before the question (picture included),
Q longest question tail, G answer tokens, R = Q + G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

from .questions import Question
from .scenes import Scene
from .tokenizer import END_OF_TURN, EOS, MASK, special_id

ANSWER_TOKENS = 16
LONGEST_TAIL = 19


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

    def answer(self, text: str) -> list[int]:
        """The answer's ids, its end of turn, and end-of-text padding: G ids."""
        ids = [*self.tokenizer.encode(text, add_special_tokens=False).ids, self.end_of_turn_id]
        assert len(ids) <= ANSWER_TOKENS, text
        return ids + [self.eos_id] * (ANSWER_TOKENS - len(ids))


@dataclass(frozen=True)
class Batch:
    """Pictures of one size, with N questions each. Tails are padded on the left, which ``valid`` hides."""

    pixel_values: Tensor
    """(B, views, 3, S, S) float32"""
    packing: Tensor
    """(V,) int64"""
    head_ids: Tensor
    """(prompt ids before the picture,) int64"""
    tail_ids: Tensor
    """(B, N, Q) int64"""
    positions: Tensor
    """(B, N, R) int64, as if each question followed the picture directly"""
    valid: Tensor
    """(B, N, R) bool"""
    answers: Tensor
    """(B, N, G) int64, the right ones"""

    @property
    def prefix(self) -> int:
        """P."""
        return len(self.head_ids) + len(self.packing)


def make_batch(
    text: Text,
    vision: VisionConfig,
    scenes: Sequence[Scene],
    questions: Sequence[Sequence[Question]],
    keep_newline: NDArray[np.bool_] | None = None,
) -> Batch:
    """Arrays for ``scenes`` of one size; ``keep_newline`` (B, N): which prompts keep the token after the picture."""
    prepared = [prepare_picture(Image.fromarray(scene.pixels), vision) for scene in scenes]
    packing = prepared[0].packing.rows[:, 0]
    head = text.head()
    prefix = len(head) + len(packing)
    shape = (len(scenes), len(questions[0]))
    tails = np.full((*shape, LONGEST_TAIL), text.eos_id, np.int64)
    positions = np.zeros((*shape, LONGEST_TAIL + ANSWER_TOKENS), np.int64)
    valid = np.zeros(positions.shape, np.bool_)
    answers = np.zeros((*shape, ANSWER_TOKENS), np.int64)
    for index in np.ndindex(shape):
        question = questions[index[0]][index[1]]
        tail = text.tail(question.text, keep_newline is None or not keep_newline[index])
        padding = LONGEST_TAIL - len(tail)
        tails[index][padding:] = tail
        valid[index][padding:] = True
        positions[index][padding:] = prefix + np.arange(len(tail) + ANSWER_TOKENS)
        answers[index] = text.answer(question.answer)
    return Batch(
        torch.from_numpy(np.stack([views.pixel_values for views in prepared])),
        torch.from_numpy(packing),
        torch.tensor(head),
        torch.from_numpy(tails),
        torch.from_numpy(positions),
        torch.from_numpy(valid),
        torch.from_numpy(answers),
    )


def hide_answers(rng: np.random.Generator, answers: Tensor, text: Text) -> Tensor:
    """Which answer tokens (B, N, G) are masked, each answer at a rate of its own.

    A quarter of the answers are masked as a whole, as at the first step; in another third only the padding shows, as
    after a few steps of decoding by confidence; the rest are masked at random.
    """
    shape = answers.shape
    way = rng.random(shape[:2])[..., None]
    rate = rng.uniform(0.1, 1.0, shape[:2])[..., None]
    hidden = rng.random(shape) < rate
    padding = (answers == text.eos_id).numpy()
    hidden = np.where(way < 0.25, True, np.where(way < 0.58, ~padding & (hidden | (way < 0.42)), hidden))
    # An answer with nothing hidden teaches nothing: hide its first token.
    hidden[..., 0] |= ~hidden.any(-1)
    return torch.from_numpy(hidden)
