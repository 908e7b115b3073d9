"""Phases 2 and 3: the language model learns to answer, then everything is tuned in the formats of inference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d3tom_export.model.lavida import Lavida

from .batches import Batch, Text, hide_answers, make_batch
from .decode import decode, exact_match
from .dense import DenseHead, dense_loss, to_pixel_values
from .digits import DigitBank
from .packed import Compaction, answer_questions, answer_single, encode_prefix, prefix_embeddings, visual_tokens
from .questions import KINDS, Question, ask
from .scenes import NATIVE_SIZE, OTHER_SIZES, Scene, make_scene, random_size
from .views import make_views

QUESTIONS_PER_SCENE = ("read", "read", "read", "count", "largest", "smallest", "place", "place", "place")
_PADDING_WEIGHT = 0.1
_KEEP_NEWLINE = 0.1
"""Share of prompts that keep the token after the picture; the released pipeline drops it."""


def answer_loss(logits: Tensor, batch: Batch, hidden: Tensor, text: Text) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of the hidden answer tokens, end-of-text padding weighing little, and the share of right ones."""
    targets = batch.answers[hidden]
    scores = logits[hidden].float()
    losses = F.cross_entropy(scores, targets, reduction="none")
    content = targets != text.eos_id
    weights = torch.where(content, 1.0, _PADDING_WEIGHT)
    right = (scores.argmax(-1) == targets)[content].float().mean().item()
    return (losses * weights).sum() / weights.sum(), {"tokens right": right}


def compaction(rng: np.random.Generator, batch: Batch, depth: int) -> Compaction:
    """Random closed-up positions: some neighbouring visual tokens share one, at rates that vary along the picture.

    A large model has met pictures and questions at all distances; this one, trained on a few picture sizes, would
    otherwise take positions for places and lose its way when merging renumbers the tokens that are left. Only
    positions vary: training neither merges nor drops a token.
    """
    head, visual = len(batch.head_ids), len(batch.packing)
    rates = rng.uniform(0.0, 1.0) * np.exp(rng.normal(0.0, 0.7, -(-visual // 16)))
    steps = rng.random(visual) < rates.repeat(16)[:visual]
    places = head + np.concatenate([[0], np.cumsum(steps)])
    positions = np.concatenate([np.arange(head), places[:-1]])
    return Compaction(int(rng.integers(1, depth - 1)), torch.from_numpy(positions), head + visual - int(places[-1]))


class _Scenes:
    """Draws scenes with questions; shared by both phases."""

    def __init__(self, model: Lavida, text: Text) -> None:
        assert model.config.vision is not None
        self.vision, self.text = model.config.vision, text
        self.bank = DigitBank.load(held_out=False)

    def draw(
        self, rng: np.random.Generator, count: int, kinds: Sequence[str], square_share: float, most_digits: int
    ) -> Batch:
        """``count`` scenes of one random size, with a question of each of ``kinds``."""
        size = random_size(rng, square_share)
        scenes = [make_scene(rng, self.bank, size, most_digits) for _ in range(count)]
        questions = [[ask(rng, scene, kind) for kind in kinds] for scene in scenes]
        keep = rng.random((count, len(kinds))) < _KEEP_NEWLINE
        return make_batch(self.text, self.vision, scenes, questions, keep)

    def hide(self, rng: np.random.Generator, batch: Batch) -> tuple[Tensor, Tensor]:
        """Answers with some tokens masked (B, N, G), and which (B, N, G)."""
        hidden = hide_answers(rng, batch.answers, self.text)
        return batch.answers.masked_fill(hidden, self.text.mask_id), hidden


class HeldOut:
    """Fixed held-out scenes: 48 square ones and 16 of other sizes."""

    def __init__(self, model: Lavida, text: Text) -> None:
        assert model.config.vision is not None
        self.model, self.text = model, text
        rng, bank = np.random.default_rng(1), DigitBank.load(held_out=True)
        sizes = [(NATIVE_SIZE, 48), *((size, 4) for size in OTHER_SIZES[:4])]
        self.groups: list[tuple[list[Scene], list[list[Question]]]] = []
        for size, count in sizes:
            scenes = [make_scene(rng, bank, size) for _ in range(count)]
            self.groups.append((scenes, [[ask(rng, scene, kind) for kind in KINDS] for scene in scenes]))

    def evaluate(self, mode: str) -> dict[str, float]:
        """Exact match overall and by kind; real formats get one question per scene, packed ones one of each kind."""
        pairs: list[tuple[Question, str]] = []
        assert self.model.config.vision is not None
        for scenes, questions in self.groups:
            asked = questions
            if mode != "packed":
                asked = [[row[index % len(KINDS)]] for index, row in enumerate(questions)]
            answers = decode(
                self.model, self.text, make_batch(self.text, self.model.config.vision, scenes, asked), mode
            )
            pairs += [pair for row in zip(asked, answers, strict=True) for pair in zip(*row, strict=True)]
        return exact_match(pairs)


class PackedPhase:
    """Phase 2: the language model alone, on frozen features, with many questions per picture."""

    name, number = "packed", 2
    evaluate_every = 200

    def __init__(
        self, model: Lavida, text: Text, held_out: HeldOut, steps: int, batch: int = 16, learning_rate: float = 2e-3
    ) -> None:
        self.model, self.held_out, self.text = model, held_out, text
        self.steps, self.batch, self.learning_rate = steps, batch, learning_rate
        self.scenes = _Scenes(model, text)

    def trains(self, name: str) -> bool:
        return name.startswith("model.transformer.") or name == "model.image_newline"

    def loss(self, rng: np.random.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        early = progress < 0.2
        batch = self.scenes.draw(
            rng, self.batch, QUESTIONS_PER_SCENE, square_share=0.5 if early else 0.75, most_digits=2 if early else 4
        )
        answer_ids, hidden = self.scenes.hide(rng, batch)
        with torch.autocast("cpu", torch.bfloat16):
            visual, _ = visual_tokens(self.model, batch)
            layers = encode_prefix(self.model, prefix_embeddings(self.model, batch, visual))
            logits = answer_questions(self.model, layers, batch, answer_ids, bool(rng.random() < 0.5))
        return answer_loss(logits, batch, hidden, self.text)

    def evaluate(self) -> dict[str, float]:
        return self.held_out.evaluate("packed")


class JointPhase:
    """Phase 3: tower and language model together, in the real formats; packed steps and dense labels go on."""

    name, number = "joint", 3
    evaluate_every = 200
    _DENSE_WEIGHT, _DENSE_VIEWS = 0.1, 16
    _COMPACTION = 0.6
    """Share of steps with closed-up positions in later layers."""

    def __init__(
        self,
        model: Lavida,
        head: DenseHead,
        text: Text,
        held_out: HeldOut,
        steps: int,
        batch: int = 16,
        learning_rate: float = 1e-3,
    ) -> None:
        self.model, self.head, self.held_out, self.text = model, head, held_out, text
        self.steps, self.batch, self.learning_rate = steps, batch, learning_rate
        self.scenes = _Scenes(model, text)

    def trains(self, name: str) -> bool:
        return True

    def loss(self, rng: np.random.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        mode = ("full", "prefix", "packed", "packed")[int(rng.integers(4))]
        kinds = QUESTIONS_PER_SCENE
        if mode != "packed":
            kinds = (QUESTIONS_PER_SCENE[int(rng.integers(len(QUESTIONS_PER_SCENE)))],)
        batch = self.scenes.draw(rng, self.batch, kinds, square_share=0.75, most_digits=4)
        answer_ids, hidden = self.scenes.hide(rng, batch)
        views, labels = make_views(rng, self.scenes.bank, self._DENSE_VIEWS)
        closed_up = None
        if rng.random() < self._COMPACTION:
            closed_up = compaction(rng, batch, len(self.model.transformer.blocks))
        with torch.autocast("cpu", torch.bfloat16):
            visual, _ = visual_tokens(self.model, batch)
            prefix = prefix_embeddings(self.model, batch, visual)
            if mode == "packed":
                layers = encode_prefix(self.model, prefix, closed_up)
                logits = answer_questions(self.model, layers, batch, answer_ids, True, closed_up)
            else:
                logits = answer_single(self.model, prefix, batch, answer_ids, mode == "full", closed_up)
            scores = self.head(self.model.encode_views(to_pixel_values(views)))
        loss, stats = answer_loss(logits, batch, hidden, self.text)
        dense = dense_loss(scores, torch.from_numpy(labels))
        return loss + self._DENSE_WEIGHT * dense, stats | {"dense": dense.item()}

    def evaluate(self) -> dict[str, float]:
        return {
            f"{mode} {kind}": value
            for mode in ("full", "prefix")
            for kind, value in self.held_out.evaluate(mode).items()
            if kind in ("all", "read")
        }
