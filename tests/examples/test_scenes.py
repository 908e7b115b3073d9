"""The stand-in's pictures and questions: every answer is what the picture shows, and looks are taught at its place."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3tom_export.config import VisionConfig
from d3tom_export.families.registry import read_config
from examples.lavida_tiny.batches import ANSWER_TOKENS, Text, ask_all
from examples.lavida_tiny.digits import DigitBank
from examples.lavida_tiny.geometry import EMBEDDING_ROWS, config_json
from examples.lavida_tiny.questions import KINDS, NAMING, NOTHING, ask, can_ask
from examples.lavida_tiny.scenes import NATIVE_SIZE, OTHER_SIZES, Scene, make_scene, random_size
from examples.lavida_tiny.shapes import COLOURS
from examples.lavida_tiny.tokenizer import train_tokenizer
from examples.lavida_tiny.views import BACKGROUND, IGNORED, ON_TILE, cells_of, label_cells

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(train_tokenizer())


@pytest.fixture(scope="module")
def bank() -> DigitBank:
    return DigitBank.load(held_out=True)


@pytest.fixture(scope="module")
def vision() -> VisionConfig:
    vision = read_config(config_json(mask_id=1, eos_id=2, pad_id=2)).vision
    assert vision is not None
    return vision


def _scene(seed: int, bank: DigitBank) -> Scene:
    rng = np.random.default_rng(seed)
    return make_scene(rng, bank, random_size(rng, square_share=0.5))


def test_held_out_digits_are_never_trained_on(bank: DigitBank) -> None:
    trained = DigitBank.load(held_out=False)
    assert len(trained.labels) + len(bank.labels) == 1797
    seen = {image.tobytes() for image in trained.images}
    assert sum(image.tobytes() in seen for image in bank.images) == 0


def test_the_same_seed_draws_the_same_pixels(bank: DigitBank) -> None:
    first, second = _scene(7, bank), _scene(7, bank)
    assert np.array_equal(first.pixels, second.pixels)
    assert first.places == second.places
    assert not np.array_equal(first.pixels, make_scene(np.random.default_rng(8), bank).pixels)


@given(SEEDS)
@settings(deadline=None, max_examples=60)
def test_scenes_are_as_their_page_says(seed: int) -> None:
    scene = _scene(seed, DigitBank.load(held_out=True))
    shapes = [thing for thing in scene.things if not thing.is_digit]
    assert 2 <= len(scene.things) <= 6
    assert 1 <= len(scene.digits) <= 3
    assert len(shapes) <= 3
    height, width, _ = scene.pixels.shape
    for place, thing in enumerate(scene.places):
        if thing is not None:  # wholly in its own place
            left, top = place % scene.columns * width / scene.columns, place // scene.columns * height / scene.rows
            assert left <= thing.box.x - thing.box.width / 2 < thing.box.x + thing.box.width / 2
            assert thing.box.x + thing.box.width / 2 <= left + width / scene.columns
            assert top <= thing.box.y - thing.box.height / 2
            assert thing.box.y + thing.box.height / 2 <= top + height / scene.rows


@given(SEEDS)
@settings(deadline=None, max_examples=60)
def test_every_thing_is_inked_where_it_is_said_to_be(seed: int) -> None:
    scene = _scene(seed, DigitBank.load(held_out=True))
    for thing in scene.things:
        left, right = round(thing.box.x - thing.box.width / 2), round(thing.box.x + thing.box.width / 2)
        top, bottom = round(thing.box.y - thing.box.height / 2), round(thing.box.y + thing.box.height / 2)
        pixels = scene.pixels[max(top, 0) : bottom, max(left, 0) : right].reshape(-1, 3).astype(np.float32)
        distance = np.abs(pixels - np.array(COLOURS[thing.colour], np.float32)).max(axis=1)
        assert (distance < 45).mean() > 0.1, thing


@given(SEEDS, st.sampled_from(KINDS))
@settings(deadline=None, max_examples=150)
def test_answers_are_what_the_scene_shows(seed: int, kind: str) -> None:
    scene = _scene(seed, DigitBank.load(held_out=True))
    if not can_ask(scene, kind):
        assert kind in NAMING
        return
    question = ask(np.random.default_rng(seed), scene, kind)
    names = {thing.name: thing for thing in scene.things}
    digits = [int(thing.kind) for thing in scene.digits]
    if kind == "read":
        assert [int(word) for word in question.answer.split()] == digits
    elif kind in ("count", "largest", "smallest"):
        assert int(question.answer) == {"count": len(digits), "largest": max(digits), "smallest": min(digits)}[kind]
    elif kind == "describe":
        said = re.findall(r"(\w+ \w+) (?:at|on|in) the", question.answer)
        assert said == [thing.name for thing in scene.things]
        assert question.answer.endswith(".")
    elif question.answer == NOTHING:
        assert kind in ("place", "neighbour")
    elif kind == "colour":
        assert [f"{colour} {question.answer}" in names for colour in COLOURS if colour in question.text] == [True]
    elif kind == "hue":
        assert any(name.startswith(question.answer) and name.split()[1] in question.text for name in names)
    elif kind in ("place", "neighbour"):
        assert any(thing.box in question.about for thing in scene.things if thing.name == question.answer)
    else:
        asked = next(thing for name, thing in names.items() if name in question.text)
        assert question.about == (asked.box,)


def test_every_answer_fits_its_slots_and_descriptions_are_long(text: Text, bank: DigitBank) -> None:
    lengths: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for seed in range(200):
        scene = _scene(seed, bank)
        for kind in KINDS:
            if can_ask(scene, kind):
                answer = ask(np.random.default_rng(seed), scene, kind).answer
                ids = text.tokenizer.encode(answer, add_special_tokens=False).ids
                assert text.tokenizer.decode(ids) == answer
                lengths[kind].append(len(text.answer(answer, ANSWER_TOKENS)) and len(ids) + 1)
    assert max(map(max, lengths.values())) <= ANSWER_TOKENS
    assert min(lengths["describe"]) >= 12
    assert max(lengths["describe"]) > 40
    assert max(lengths["place"]) <= 4


def test_the_tokenizer_leaves_unused_rows(text: Text) -> None:
    assert text.tokenizer.get_vocab_size() < EMBEDDING_ROWS


@pytest.mark.parametrize("size", [NATIVE_SIZE, *OTHER_SIZES])
def test_tokens_lie_on_the_picture_where_their_pixels_come_from(
    size: tuple[int, int], bank: DigitBank, text: Text, vision: VisionConfig
) -> None:
    # A black picture with one white thing: the views' light falls on the tokens that are said to show it.
    scene = make_scene(np.random.default_rng(3), bank, size)
    box = scene.things[0].box
    pixels = np.zeros_like(scene.pixels)
    left, top = round(box.x - box.width / 2), round(box.y - box.height / 2)
    pixels[top : round(box.y + box.height / 2), left : round(box.x + box.width / 2)] = 255
    question = ask(np.random.default_rng(0), scene, "describe")
    asked = ask_all(text, vision, Scene(pixels, scene.columns, scene.rows, scene.places), [question], ANSWER_TOKENS)
    side, views = vision.tokens_per_side, asked.pixel_values
    light = (views.mean(1) + 1).reshape(len(views), side, views.shape[2] // side, side, -1).mean((2, 4)).flatten() / 2
    cells = cells_of(size, vision)
    assert len(cells.x) == len(light)
    inside = (np.abs(cells.x - box.x) < (box.width - cells.width) / 2) & (
        np.abs(cells.y - box.y) < (box.height - cells.height) / 2
    )
    beyond = (np.abs(cells.x - box.x) > (box.width + cells.width * 2) / 2) | (
        np.abs(cells.y - box.y) > (box.height + cells.height * 2) / 2
    )
    assert inside.any()
    assert light.numpy()[inside].min() > 0.9
    assert light.numpy()[beyond].max() < 0.1


def test_labels_name_things_and_leave_out_their_borders(bank: DigitBank, vision: VisionConfig) -> None:
    scene = make_scene(np.random.default_rng(4), bank)
    labels = label_cells(scene, vision)
    kinds, colours = labels.kind, labels.colour
    named = set(kinds[(kinds != BACKGROUND) & (kinds != IGNORED)].tolist())
    assert len(named) == len({thing.kind for thing in scene.things})
    assert ((kinds == IGNORED) == (colours == IGNORED)).all()
    assert 0.8 < (kinds == BACKGROUND).mean() < 0.98
    # In the thumbnail the thirds are the places of a square picture.
    thumbnail = slice(vision.tokens_per_view)
    for place, thing in enumerate(scene.places):
        if thing is not None:
            cells = cells_of(NATIVE_SIZE, vision)
            (nearest,) = np.argsort(np.hypot(cells.x - thing.box.x, cells.y - thing.box.y)[thumbnail])[:1]
            assert abs(labels.row[nearest] - place // 3) + abs(labels.column[nearest] - place % 3) <= 1
    for thirds in (labels.row, labels.column):
        assert set(thirds[thumbnail].tolist()) == {0, 1, 2}
        on_tiles = thirds[vision.tokens_per_view :]
        assert set(on_tiles.tolist()) == {ON_TILE, IGNORED}
        assert (
            (on_tiles == ON_TILE) == (np.isin(kinds[vision.tokens_per_view :], (BACKGROUND, IGNORED), invert=True))
        ).all()
