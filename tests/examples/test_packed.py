"""Many questions in one pass get what the package's own passes give each of them alone."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from d3tom_export.config import MergeConfig
from d3tom_export.merging.cached import extend, forward_cached, prefill, prefill_merged, score_prompt
from d3tom_export.merging.forward import Merging
from d3tom_export.model.lavida import Lavida
from examples.lavida_tiny.batches import SHORT_ANSWER, Asked, Text, hide_answers
from examples.lavida_tiny.initial import SHALLOW
from examples.lavida_tiny.language import Asker, Pictures, chance_scores
from examples.lavida_tiny.packed import LOOK_LAYER, PackedMerge, answer_questions, prefix_embeddings, visual_tokens
from examples.lavida_tiny.scenes import LONG_SIZES
from examples.lavida_tiny.tokenizer import train_tokenizer
from examples.lavida_tiny.train import fresh_model


class Subject(NamedTuple):
    model: Lavida
    asked: Asked
    prefix: Tensor
    answer_ids: Tensor

    def alone(self, row: int) -> Asked:
        """Question ``row`` without its neighbours and its padding."""
        asked = self.asked.some([row])
        padding = int((~asked.valid).sum())
        return replace(asked, tail_ids=asked.tail_ids[:, padding:], valid=asked.valid[:, padding:])

    def tail(self, row: int) -> Tensor:
        """The embedded question and answer (1, R, D)."""
        ids = torch.cat([self.alone(row).tail_ids, self.answer_ids[row : row + 1]], dim=1)
        return self.model.embed_tokens(ids)

    @property
    def visual_positions(self) -> Tensor:
        return torch.arange(len(self.asked.head_ids), self.asked.prefix)


@pytest.fixture(scope="module")
def subject() -> Subject:
    text = Text(train_tokenizer())
    model, _ = fresh_model(text, 3)
    for block in model.transformer.blocks[SHALLOW:]:  # which begin as identities
        for linear in (block.attn_out, block.ff_out):
            torch.nn.init.normal_(linear.weight, std=0.02)
    rng = np.random.default_rng(5)
    asked, _, _ = Asker(model, text, held_out=True).draw(
        rng, ("read", "place", "neighbour"), LONG_SIZES[0], SHORT_ANSWER
    )
    hidden = hide_answers(rng, asked.answers, text)
    with torch.no_grad():
        prefix = prefix_embeddings(model, asked, visual_tokens(model, asked)[0])
    return Subject(model, asked, prefix, asked.answers.masked_fill(hidden, text.mask_id))


@torch.no_grad()
def test_questions_do_not_see_one_another(subject: Subject) -> None:
    assert not subject.asked.valid.all(), "no question is padded"
    for visible in (True, False):
        together = answer_questions(subject.model, subject.asked, subject.prefix, subject.answer_ids, visible)
        for row in range(3):
            alone = answer_questions(
                subject.model, subject.alone(row), subject.prefix, subject.answer_ids[row : row + 1], visible
            )
            torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(together.looks[row], alone.looks[0], atol=1e-6, rtol=1e-4)
            assert together.looks[row].sum(-1).max() < 1


@torch.no_grad()
def test_unmerged_it_is_a_step_over_a_cached_prefix(subject: Subject) -> None:
    result = answer_questions(subject.model, subject.asked, subject.prefix, subject.answer_ids, True)
    cache = prefill(subject.model.transformer, subject.prefix).cache
    for row in range(3):
        own, _ = forward_cached(subject.model.transformer, cache, subject.tail(row))
        torch.testing.assert_close(result.logits[row], own.logits[0, -SHORT_ANSWER:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, LOOK_LAYER, 5])
def test_merged_it_is_what_the_package_does(subject: Subject, layer: int) -> None:
    transformer, asked = subject.model.transformer, subject.asked
    visual = len(asked.packing)
    keep = visual // 10
    scores = chance_scores(np.random.default_rng(layer), visual, keep)
    nobody = torch.zeros(3, SHORT_ANSWER, dtype=torch.bool)
    merge = PackedMerge(layer, keep, "merge", nobody, scores)
    result = answer_questions(subject.model, asked, subject.prefix, subject.answer_ids, True, merge)
    for row in range(3):
        tail = subject.tail(row)
        deciders = torch.ones(1, tail.shape[1], dtype=torch.bool)
        merging = Merging(MergeConfig(layer, 0.9), deciders, subject.visual_positions, keep, scores)
        scored = score_prompt(transformer, subject.prefix, tail, merging)
        held = prefill_merged(transformer, scored).merged
        own, _ = forward_cached(transformer, scored.cache, tail, held=held)
        torch.testing.assert_close(result.logits[row], own.logits[0, -SHORT_ANSWER:], atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, LOOK_LAYER, 5])
@pytest.mark.parametrize("chooses", ["deciders", "chance"])
def test_a_merged_cache_is_what_the_package_does(subject: Subject, layer: int, chooses: str) -> None:
    transformer, asked = subject.model.transformer, subject.asked
    visual = len(asked.packing)
    keep = visual // 10
    deciders = torch.rand(3, SHORT_ANSWER, generator=torch.Generator().manual_seed(layer)) < 0.4
    deciders[:, 0] = True
    scores = chance_scores(np.random.default_rng(layer), visual, keep) if chooses == "chance" else None
    merge = PackedMerge(layer, keep, "cache", deciders, scores)
    result = answer_questions(subject.model, asked, subject.prefix, subject.answer_ids, False, merge)
    prefix = prefill(transformer, subject.prefix).cache
    kept = []
    for row in range(3):
        question, answer = subject.tail(row).split([subject.alone(row).tail_ids.shape[1], SHORT_ANSWER], dim=1)
        cache = extend(transformer, prefix, question).cache
        merging = Merging(MergeConfig(layer, 0.9), deciders[row : row + 1], subject.visual_positions, keep, scores)
        own, merged = forward_cached(transformer, cache, answer, merging)
        assert merged is not None
        kept.append(merged.kept)
        torch.testing.assert_close(result.logits[row], own.logits[0], atol=1e-3, rtol=1e-3)
    assert (chooses == "chance") == torch.equal(kept[0], kept[1])


@torch.no_grad()
def test_deciders_of_all_questions_choose_together(subject: Subject) -> None:
    visual = len(subject.asked.packing)
    deciders = torch.rand(3, SHORT_ANSWER) < 0.4
    plain = answer_questions(subject.model, subject.asked, subject.prefix, subject.answer_ids, True)
    scores = (plain.looks * deciders.unsqueeze(-1)).sum((0, 1))[None]
    by_deciders, by_scores = (
        answer_questions(
            subject.model,
            subject.asked,
            subject.prefix,
            subject.answer_ids,
            True,
            PackedMerge(LOOK_LAYER, visual // 8, "merge", deciders, given),
        )
        for given in (None, scores)
    )
    torch.testing.assert_close(by_deciders.logits, by_scores.logits, atol=1e-4, rtol=1e-4)
    assert (by_deciders.logits - plain.logits).abs().max() > 1e-3


@torch.no_grad()
def test_what_all_tokens_keep_is_not_merged(subject: Subject) -> None:
    visual = len(subject.asked.packing)
    everyone = torch.ones(3, SHORT_ANSWER, dtype=torch.bool)
    plain = answer_questions(subject.model, subject.asked, subject.prefix, subject.answer_ids, True)
    for way in ("merge", "drop"):
        merge = PackedMerge(LOOK_LAYER, visual, "merge" if way == "merge" else "drop", everyone)
        same = answer_questions(subject.model, subject.asked, subject.prefix, subject.answer_ids, True, merge)
        torch.testing.assert_close(same.logits, plain.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_shallow_model_grows_without_a_jump(subject: Subject) -> None:
    model, _ = fresh_model(Text(train_tokenizer()), 3)
    shallow, whole = (
        answer_questions(model, subject.asked, subject.prefix, subject.answer_ids, True, depth=depth)
        for depth in (SHALLOW, None)
    )
    assert len(model.transformer.blocks) > SHALLOW
    torch.testing.assert_close(shallow.logits, whole.logits, atol=1e-6, rtol=1e-5)
    deep = answer_questions(subject.model, subject.asked, subject.prefix, subject.answer_ids, True)
    assert (deep.logits - whole.logits).abs().max() > 0.01


@torch.no_grad()
def test_pictures_are_encoded_once_and_depend_on_the_seed_alone(subject: Subject) -> None:
    asker = Asker(subject.model, Text(train_tokenizer()), held_out=False)
    pictures = [Pictures(asker, subject.model, seed, count=3) for seed in (1, 1, 2)]
    drawn = [[each.draw(np.random.default_rng(number), 0.5) for number in range(4)] for each in pictures]
    for (asked, rows), (again, same), (_, other) in zip(*drawn, strict=True):
        assert torch.equal(asked.answers, again.answers)
        assert torch.equal(rows, same)
        assert rows.shape == (asked.packing.max() + 1, subject.model.config.language.d_model)
        assert rows.shape != other.shape or not torch.equal(rows, other)
    assert len(pictures[0]._encoded) <= 3


def test_where_things_are_is_looked_up_in_the_thumbnail(subject: Subject) -> None:
    vision = subject.model.config.vision
    assert vision is not None
    asker = Asker(subject.model, Text(train_tokenizer()), held_out=False)
    kinds = ("place", "where", "colour", "count")
    asked, questions, _ = asker.draw(np.random.default_rng(8), kinds, LONG_SIZES[0], SHORT_ANSWER)
    assert [question.kind for question in questions] == list(kinds)
    on_tiles = asked.shown[:, asked.packing >= vision.tokens_per_view].any(1)
    assert on_tiles.tolist() == [False, False, True, True]
    assert asked.shown[:, asked.packing < vision.tokens_per_view].any(1).all()


@torch.no_grad()
def test_the_tower_attends_in_steps_as_in_one(subject: Subject) -> None:
    plain = Lavida(subject.model.config)
    plain.load_state_dict(subject.model.state_dict())
    views = subject.asked.pixel_values
    torch.testing.assert_close(subject.model.encode_views(views), plain.encode_views(views), atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        fused, in_steps = plain.encode_views(views), subject.model.encode_views(views)
    assert not torch.equal(fused, in_steps)
    assert (fused - in_steps).float().norm() < 0.03 * fused.float().norm()


def test_shown_padding_does_not_tell_where_an_answer_ends() -> None:
    """A model that met it shown from its first token on takes what stands before shown padding for the end."""
    text = Text(train_tokenizer())
    answers = torch.tensor([text.answer("7", 48)] * 600)
    hidden = hide_answers(np.random.default_rng(0), answers, text)
    end = int((answers[0] != text.eos_id).sum())
    shown = 48 - (~hidden).flip(-1).cumprod(-1).sum(-1)  # where what is shown up to the last token begins
    from_some_place_on = shown[hidden[:, :end].all(-1) & (shown < 48)]
    assert len(from_some_place_on) > 100
    assert (from_some_place_on == end).float().mean() < 0.2
    assert (from_some_place_on < end + 10).float().mean() > 0.3


def test_answers_in_blocks_show_what_stands_before_and_hide_what_follows() -> None:
    text = Text(train_tokenizer())
    answers = torch.tensor([text.answer("blue star at the top left, green 8 in the middle.", 48)] * 600)
    hidden = hide_answers(np.random.default_rng(0), answers, text, in_blocks=1.0)
    end = int((answers[0] != text.eos_id).sum())
    before = hidden.int().argmax(-1)  # how many tokens show before the first hidden one
    behind = 48 - hidden.flip(-1).int().cumprod(-1).sum(-1)  # the place from which on all are hidden
    assert set(before.tolist()) >= set(range(end))
    assert (behind - before <= 16).all()
    assert (hidden.sum(-1) > 48 - behind).any()  # some of a block are hidden and some not
    assert ((before < behind) & (behind < 48)).float().mean() > 0.3
    some = hide_answers(np.random.default_rng(0), answers, text, in_blocks=0.3)
    assert torch.equal(
        hide_answers(np.random.default_rng(0), answers, text),
        hide_answers(np.random.default_rng(0), answers, text, 0.0),
    )
    assert 0.1 < (some == hidden).all(-1).float().mean() < 0.5
