"""Phases 2 to 5: the language model learns to answer.

From early on visual tokens are merged, dropped and closed up in part of the steps, at random layers, ratios and
choices: what a large model bears by its scale, this one has to have met.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d3tom_export.model.lavida import Lavida

from .batches import ANSWER_TOKENS, NEAR_PADDING, SHORT_ANSWER, Asked, Text, ask_all, hide_answers, thinned
from .dense import dense_parts
from .digits import DigitBank
from .initial import SHALLOW
from .layout import OrderHead, layout_loss
from .loop import Part
from .packed import LOOK_LAYER, PackedMerge, answer_questions, prefix_embeddings, visual_tokens
from .questions import KINDS, Question, ask, can_ask
from .scenes import Scene, make_scene, random_size

_SHORT = (
    "read", "count", "largest", "smallest",
    *("place", "colour", "where") * 3, *("neighbour",) * 5, "hue",
)  # fmt: skip
_LONG = (*("describe",) * 4, "neighbour", *("read",) * 2, "place", "colour", "hue", "where")
"""Kinds asked of one picture, with short and with long answer slots, which all answers have at inference."""
_LAID_OUT = (*("describe",) * 6, *("read",) * 2, "neighbour", "where")
"""Kinds asked where it is learnt how descriptions are laid out."""
_EVERY = (*KINDS, *("describe",) * 3, "read")
"""Kinds asked in the last phase, all with long slots."""
_LONG_SHARE, _LOOKUP_LONG_SHARE = 0.7, 0.3

_FAR_PADDING_WEIGHT = 0.02
"""Of the padding behind the near padding, which weighs as answers do: where an answer may end or go on, a smaller
weight would teach that it goes on."""
_FIRST_LOOK_WEIGHT, _LOOK_WEIGHT = 0.5, 0.15
"""Of the loss that asks answers to look at what is asked about, before merging is met and after."""
_LAYOUT_WEIGHT, _LAST_LAYOUT_WEIGHT = 0.5, 0.1
"""Of the losses that teach where each word of a description stands, in phases 4 and 5."""
_RAMP = 0.4
"""Share of the packed phase over which merging grows to its full share."""
_MERGED_SHARE = 0.6
"""Of the parts, those that merge."""
_CHANCE_SHARE, _LAST_CHANCE_SHARE = 0.3, 0.1
"""Of these, those in which chance chooses the tokens, in phases 3 and 5."""
_WAYS: tuple[Literal["merge", "drop", "cache"], ...] = ("merge", "merge", "cache", "cache", "drop")
_IN_BLOCKS, _BLOCKS_FROM = 0.3, 0.25
"""Share of the answers that are masked in blocks, and from which share of phase 5 on."""
_CACHES = 8
"""Questions asked where caches are merged, which takes as long for each of them as all else together."""
_THINNED_SHARE = 0.4
"""Of the packed parts, those whose pictures are thinned."""
_KEEP_NEWLINE = 0.1
"""Share of prompts that keep the token after the picture; the released pipeline drops it."""
_DEEPEST_MERGE = 6


def answer_loss(logits: Tensor, asked: Asked, hidden: Tensor, text: Text) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of the hidden answer tokens, far padding weighing little, and the share of right ones."""
    targets = asked.answers[hidden]
    scores = logits[hidden].float()
    losses = F.cross_entropy(scores, targets, reduction="none")
    padding = asked.answers == text.eos_id
    far = (padding.cumsum(-1) > NEAR_PADDING)[hidden]
    weights = torch.where(far, _FAR_PADDING_WEIGHT, 1.0)
    right = (scores.argmax(-1) == targets)[~padding[hidden]].float().mean().item()
    return (losses * weights).sum() / weights.sum(), {"tokens right": right}


def look_loss(looks: Tensor, shown: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Minus the logarithm of the share of attention ``looks`` (N, S, V) that falls on ``shown`` (N, V)."""
    share = (looks * shown.unsqueeze(1)).sum(-1) / looks.sum(-1).clamp_min(1e-9)
    return -share.clamp_min(1e-4).log().mean(), {"look": share.mean().item()}


def random_keep(rng: np.random.Generator, visual: int) -> int:
    """K, half of the times as the adaptive schedule at a ratio of 0.9 spreads it, else up to half of the tokens."""
    share = rng.uniform(0.01, 0.2) if rng.random() < 0.6 else np.exp(rng.uniform(np.log(0.02), np.log(0.5)))
    return max(1, int(visual * share))


def random_layer(rng: np.random.Generator) -> int:
    """The merge layer: in half of the steps :data:`packed.LOOK_LAYER`."""
    return LOOK_LAYER if rng.random() < 0.5 else int(rng.integers(1, _DEEPEST_MERGE + 1))


def chance_scores(rng: np.random.Generator, visual: int, keep: int) -> Tensor:
    """Scores (1, V) that choose K tokens at random, or by an even stride that starts anywhere."""
    scores = torch.from_numpy(rng.random((1, visual), np.float32))
    if rng.random() < 0.5:
        offset = rng.uniform(0, visual / keep)
        scores[:, np.minimum((offset + np.arange(keep) * visual / keep).astype(np.int64), visual - 1)] += 1
    return scores


class Asker:
    """Draws pictures with questions."""

    def __init__(self, model: Lavida, text: Text, *, held_out: bool) -> None:
        assert model.config.vision is not None
        self.vision, self.text = model.config.vision, text
        self.bank = DigitBank.load(held_out=held_out)

    def draw(
        self, rng: np.random.Generator, kinds: Sequence[str], size: tuple[int, int], answer_tokens: int
    ) -> tuple[Asked, list[Question], Scene]:
        """A picture of ``size`` with a question of each of ``kinds``, or of a place where there is none of a kind."""
        scene = make_scene(rng, self.bank, size)
        return *self.ask(rng, scene, kinds, answer_tokens), scene

    def ask(
        self, rng: np.random.Generator, scene: Scene, kinds: Sequence[str], answer_tokens: int
    ) -> tuple[Asked, list[Question]]:
        """Questions about ``scene``, as :meth:`draw` has them."""
        questions = [ask(rng, scene, kind if can_ask(scene, kind) else "place") for kind in kinds]
        keep = rng.random(len(kinds)) < _KEEP_NEWLINE
        return ask_all(self.text, self.vision, scene, questions, answer_tokens, keep), questions

    def ask_many(self, rng: np.random.Generator, scene: Scene, long_share: float, kinds: Sequence[str]) -> Asked:
        """Many questions about ``scene``: at this rate those of ``kinds``, with long answers, or short ones."""
        long = rng.random() < long_share
        kinds, answer_tokens = (kinds, ANSWER_TOKENS) if long else (_SHORT, SHORT_ANSWER)
        return self.ask(rng, scene, kinds, answer_tokens)[0]


class HeldOut:
    """Fixed held-out scenes, asked one question of each kind in one pass, all of the answer in one step.

    That is a lower bound of exact match: at inference an answer has sixteen steps.
    """

    def __init__(self, model: Lavida, text: Text, scenes: int = 48) -> None:
        asker = Asker(model, text, held_out=True)
        rng = np.random.default_rng(1)
        self.model, self.text = model, text
        self.asked = [asker.draw(rng, KINDS, random_size(rng), ANSWER_TOKENS) for _ in range(scenes)]

    @torch.no_grad()
    def evaluate(self, merge_ways: Sequence[str] = ("none", "merge")) -> dict[str, float]:
        """Exact match, overall and by kind; "merge" keeps every tenth token at the look layer, by the mask rows."""
        right: dict[str, list[bool]] = defaultdict(list)
        for asked, questions, _ in self.asked:
            with torch.autocast("cpu", torch.bfloat16):
                prefix = prefix_embeddings(self.model, asked, visual_tokens(self.model, asked)[0])
                masked = torch.full_like(asked.answers, self.text.mask_id)
                for way in merge_ways:
                    merge = None
                    if way == "merge":
                        deciders = torch.ones_like(masked, dtype=torch.bool)
                        merge = PackedMerge(LOOK_LAYER, len(asked.packing) // 10, "merge", deciders)
                    ids = answer_questions(self.model, asked, prefix, masked, True, merge).logits.argmax(-1)
                    # What follows the end of the turn is cut off.
                    ends = (asked.answers == self.text.end_of_turn_id).cumsum(-1) - (
                        asked.answers == self.text.end_of_turn_id
                    ).long()
                    same = ((ids == asked.answers) | (ends > 0)).all(-1)
                    for question, verdict in zip(questions, same.tolist(), strict=True):
                        right[f"{way} all"].append(verdict)
                        right[f"{way} {question.kind}"].append(verdict)
        return {name: sum(values) / len(values) for name, values in right.items()}


class Pictures:
    """Pictures of which the frozen tower's features are kept, so that each is encoded once and asked about often."""

    def __init__(self, asker: Asker, model: Lavida, seed: int, count: int = 3000) -> None:
        self.asker, self.model, self.seed, self.count = asker, model, seed, count
        self._encoded: dict[int, tuple[Scene, Tensor]] = {}

    def _encode(self, number: int) -> tuple[Scene, Tensor]:
        """A picture and its features (views * T, D) bfloat16."""
        if number not in self._encoded:
            rng = np.random.default_rng([self.seed, 0, number])
            scene = make_scene(rng, self.asker.bank, random_size(rng))
            views, _ = dense_parts(self.model, scene)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                self._encoded[number] = scene, self.model.encode_views(views).flatten(0, 1).bfloat16()
        return self._encoded[number]

    def draw(self, rng: np.random.Generator, long_share: float, kinds: Sequence[str] = _LONG) -> tuple[Asked, Tensor]:
        """One of them with many questions, and its features with the newline's row behind them: (views * T + 1, D)."""
        scene, features = self._encode(int(rng.integers(self.count)))
        asked = self.asker.ask_many(rng, scene, long_share, kinds)
        newline = self.model.model.image_newline[None]
        return asked, torch.cat([features.to(newline.dtype), newline])


class LookupPhase:
    """Phase 2: the first blocks of the language model learn to find what a question is about, and to say what it is.

    On frozen features, in pictures from which most of the empty background is left out, with mostly short answers.
    """

    name, number = "lookup", 2
    evaluate_every = 400
    layout_weight = 0.0
    """Of :func:`layout.layout_loss`."""

    def __init__(
        self,
        model: Lavida,
        text: Text,
        held_out: HeldOut,
        pictures: Pictures,
        order: OrderHead,
        steps: int,
        parts: int = 8,
        learning_rate: float = 4e-3,
    ) -> None:
        self.model, self.held_out, self.text, self.pictures, self.order = model, held_out, text, pictures, order
        self.steps, self.parts, self.learning_rate = steps, parts, learning_rate

    def trains(self, name: str) -> bool:
        if name.startswith("heads.order."):
            return self.layout_weight > 0
        return name.startswith("model.transformer.") or name == "model.image_newline"

    @property
    def layout(self) -> tuple[OrderHead, float] | None:
        """The head and the weight of the labels of descriptions, where this phase gives them."""
        return (self.order, self.layout_weight) if self.layout_weight else None

    def part(self, rng: np.random.Generator, progress: float, place: int) -> Part:
        asked, rows = self.pictures.draw(rng, _LOOKUP_LONG_SHARE)
        asked = thinned(rng, asked, rng.uniform(0.05, 0.3))
        visual = rows[asked.packing][None]
        return packed_part(rng, self.model, self.text, asked, visual, 0.0, _FIRST_LOOK_WEIGHT, depth=SHALLOW)

    def evaluate(self) -> dict[str, float]:
        return self.held_out.evaluate()


class PackedPhase(LookupPhase):
    """Phase 3: all blocks, whole pictures, long answers, and from its start on more and more merging."""

    name, number = "packed", 3
    evaluate_every = 200
    long_share, kinds, chance_share = _LONG_SHARE, _LONG, _CHANCE_SHARE

    def ramp(self, progress: float) -> float:
        """How far the share of merged parts has grown, from 0 to 1."""
        return min(progress / _RAMP, 1.0)

    def in_blocks(self, progress: float) -> float:
        """Share of the answers that are masked as decoding by blocks leaves them."""
        return 0.0

    def part(self, rng: np.random.Generator, progress: float, place: int) -> Part:
        asked, rows = self.pictures.draw(rng, self.long_share, self.kinds)
        if rng.random() < _THINNED_SHARE:
            asked = thinned(rng, asked, rng.uniform(0.05, 0.4))
        ramp = self.ramp(progress)
        look_weight = _FIRST_LOOK_WEIGHT + ramp * (_LOOK_WEIGHT - _FIRST_LOOK_WEIGHT)
        visual = rows[asked.packing][None]
        merged = ramp * _MERGED_SHARE
        chance, blocks = self.chance_share, self.in_blocks(progress)
        return packed_part(
            rng, self.model, self.text, asked, visual, merged, look_weight, chance, layout=self.layout, in_blocks=blocks
        )


class LayoutPhase(LookupPhase):
    """Phase 4: all blocks learn where each word of a description stands, which is after all the words before it.

    A description of six things is a place for each of 42 tokens, and how many tokens stand before one only the whole
    picture tells. So this takes many descriptions, cheap ones, of pictures of which little more than what shows
    something is left, and labels (``layout.py``).
    """

    name, number = "layout", 4
    layout_weight = _LAYOUT_WEIGHT

    def part(self, rng: np.random.Generator, progress: float, place: int) -> Part:
        asked, rows = self.pictures.draw(rng, 1.0, _LAID_OUT)
        asked = thinned(rng, asked, rng.uniform(0.0, 0.1))
        visual = rows[asked.packing][None]
        return packed_part(rng, self.model, self.text, asked, visual, 0.0, _LOOK_WEIGHT, layout=self.layout)


class MergedPhase(PackedPhase):
    """Phase 5: phase 3 once more, every kind asked as at inference, with all of the merging from the first step on."""

    name, number = "merged", 5
    long_share, kinds, chance_share = 1.0, _EVERY, _LAST_CHANCE_SHARE
    layout_weight = _LAST_LAYOUT_WEIGHT

    def ramp(self, progress: float) -> float:
        return 1.0

    def in_blocks(self, progress: float) -> float:
        return _IN_BLOCKS if progress >= _BLOCKS_FROM else 0.0


def packed_part(
    rng: np.random.Generator,
    model: Lavida,
    text: Text,
    asked: Asked,
    visual: Tensor,
    merged: float,
    look_weight: float,
    chance_share: float = 0.0,
    depth: int | None = None,
    layout: tuple[OrderHead, float] | None = None,
    in_blocks: float = 0.0,
) -> Part:
    """Loss of one packed pass through the first ``depth`` blocks, or all.

    With probability ``merged`` it merges, at a rate of ``chance_share`` what chance chooses. ``layout``: the head and
    the weight of :func:`layout.layout_loss`; ``in_blocks``: as :func:`batches.hide_answers` has it.
    """
    hidden = hide_answers(rng, asked.answers, text, in_blocks)
    merge = None
    if rng.random() < merged:
        way = _WAYS[int(rng.integers(len(_WAYS)))]
        if way == "cache":
            rows = rng.permutation(len(hidden))[:_CACHES].tolist()
            asked, hidden = asked.some(rows), hidden[rows]
        keep = random_keep(rng, visual.shape[1])
        deciders = torch.from_numpy(rng.random(hidden.shape) < 0.3)
        deciders[:, 0] |= ~deciders.any(-1)
        by_chance = rng.random() < chance_share
        scores = chance_scores(rng, visual.shape[1], keep) if by_chance else None
        merge = PackedMerge(random_layer(rng), keep, way, deciders, scores)
    answer_visible = bool(rng.random() < 0.5) and (merge is None or merge.way != "cache")
    with torch.autocast("cpu", torch.bfloat16):
        prefix = prefix_embeddings(model, asked, visual)
        answer_ids = asked.answers.masked_fill(hidden, text.mask_id)
        result = answer_questions(model, asked, prefix, answer_ids, answer_visible, merge, depth)
    loss, stats = answer_loss(result.logits, asked, hidden, text)
    # Merged before it is looked at, a picture has lost what should be.
    if merge is not None and merge.layer < LOOK_LAYER:
        return Part(loss, stats)
    look, seen = look_loss(result.looks, asked.shown)
    stats = {("merged right" if merge else name): value for name, value in stats.items()} | seen
    loss = loss + look_weight * look
    if layout is not None:
        order, weight = layout
        laid_out, right = layout_loss(order, result, asked)
        loss, stats = loss + weight * laid_out, stats | right
    return Part(loss, stats)
