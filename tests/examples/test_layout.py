"""The labels that teach where each word of a description stands say what the words say."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from d3tom_export.model.lavida import Lavida
from examples.lavida_tiny.batches import ANSWER_TOKENS, NO_THING, Asked, Text, thinned
from examples.lavida_tiny.language import Asker
from examples.lavida_tiny.layout import OrderHead, follow_loss, order_loss, starts_of
from examples.lavida_tiny.packed import PackedMerge, PackedResult, answer_questions, prefix_embeddings, visual_tokens
from examples.lavida_tiny.scenes import NATIVE_SIZE, Scene
from examples.lavida_tiny.tokenizer import train_tokenizer
from examples.lavida_tiny.train import fresh_model
from examples.lavida_tiny.views import cells_of


class Subject(NamedTuple):
    text: Text
    model: Lavida
    asked: Asked
    scene: Scene


@pytest.fixture(scope="module")
def subject() -> Subject:
    text = Text(train_tokenizer())
    model, _ = fresh_model(text, 3)
    asked, _, scene = Asker(model, text, held_out=True).draw(
        np.random.default_rng(4), ("describe", "place", "describe"), NATIVE_SIZE, ANSWER_TOKENS
    )
    return Subject(text, model, asked, scene)


def test_tokens_are_about_the_thing_that_they_name(subject: Subject) -> None:
    asked, things = subject.asked, subject.scene.things
    assert torch.equal(asked.named[0], asked.named[2])
    assert (asked.named[1] == NO_THING).all()  # no description
    for number, thing in enumerate(things):
        said = subject.text.tokenizer.decode(asked.answers[0][asked.named[0] == number].tolist())
        assert said.strip().startswith(thing.name)
        assert sum(other.name in said for other in things) == 1
    starts = starts_of(asked)
    assert starts is not None
    assert starts.tolist() == sorted(starts.tolist())
    assert len(starts) == len(things)


def test_visual_tokens_show_the_thing_that_lies_there(subject: Subject) -> None:
    asked, vision = subject.asked, subject.model.config.vision
    assert vision is not None
    cells = cells_of(NATIVE_SIZE, vision)
    for number, thing in enumerate(subject.scene.things):
        rows = asked.packing[asked.thing == number].numpy()
        assert len(rows) >= 4
        assert (np.abs(cells.x[rows] - thing.box.x) < thing.box.width / 2 + cells.width[rows]).all()
        assert (np.abs(cells.y[rows] - thing.box.y) < thing.box.height / 2 + cells.height[rows]).all()
    few = thinned(np.random.default_rng(0), asked, 0.0)
    assert torch.equal(few.thing, asked.thing[asked.thing != NO_THING])


def test_losses_vanish_where_everything_is_known_and_only_there(subject: Subject) -> None:
    asked = subject.asked
    starts = starts_of(asked)
    assert starts is not None
    head = OrderHead(ANSWER_TOKENS)
    with torch.no_grad():
        head.weight.copy_(50 * torch.eye(ANSWER_TOKENS))
        head.bias.zero_()
    rows = torch.eye(ANSWER_TOKENS)[starts[asked.thing.clamp_min(0)]]
    follow = (asked.thing == asked.named.unsqueeze(-1)).float() + 1e-9
    known = PackedResult(torch.empty(0), torch.empty(0), follow, rows, None)
    loss, stats = order_loss(head, known, asked)
    assert loss < 1e-6
    assert stats == {"order": 1.0}
    loss, stats = follow_loss(known, asked)
    assert loss < 1e-4
    assert stats["follow"] == pytest.approx(1, abs=1e-4)
    unknown = PackedResult(torch.empty(0), torch.empty(0), torch.ones_like(follow), torch.zeros_like(rows), None)
    assert order_loss(head, unknown, asked)[0].item() == pytest.approx(np.log(ANSWER_TOKENS), abs=1e-4)
    assert follow_loss(unknown, asked)[0] > 1
    kept = torch.arange(0, len(asked.thing), 3)
    assert order_loss(head, known.__class__(known.logits, known.looks, follow, rows[kept], kept), asked)[0] < 1e-6
    nothing = replace(asked, named=torch.full_like(asked.named, NO_THING))
    assert order_loss(head, known, nothing)[1] == follow_loss(known, nothing)[1] == {}


@torch.no_grad()
def test_a_merged_pass_tells_which_tokens_are_left(subject: Subject) -> None:
    model, asked = subject.model, subject.asked
    prefix = prefix_embeddings(model, asked, visual_tokens(model, asked)[0])
    masked = torch.full_like(asked.answers, subject.text.mask_id)
    keep = len(asked.packing) // 10
    for way, left in (("merge", keep), ("drop", keep), ("cache", len(asked.packing))):
        merge = PackedMerge(2, keep, way, torch.ones_like(masked, dtype=torch.bool))  # type: ignore[arg-type]
        result = answer_questions(model, asked, prefix, masked, False, merge)
        assert result.rows is not None
        assert len(result.rows) == left
        if way == "cache":
            assert result.kept is None
            assert result.follow is None  # each answer looks at a cache of its own
        else:
            assert result.kept is not None
            assert result.follow is not None
            gone = torch.ones(len(asked.packing), dtype=torch.bool)
            gone[result.kept] = False
            assert (result.follow[..., gone] == 0).all()
            assert (result.follow[..., result.kept] > 0).all()
