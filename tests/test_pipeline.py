"""Prompts from questions and pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d3tom_export import pipeline
from d3tom_export.api.pictures import see
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import GenerationConfig
from d3tom_export.errors import D3tomError
from d3tom_export.families.registry import family_of, read_config
from d3tom_export.loop.denoise import StepRecord, StepResult
from d3tom_export.pictures.canvas import count_visual_tokens
from d3tom_export.pictures.seen import SeenPictures
from d3tom_export.pictures.views import prepare_picture
from d3tom_export.pipeline import Reader
from d3tom_export.progress import no_note
from d3tom_export.prompt.chat import IMAGE_TOKEN_INDEX
from d3tom_export.prompt.conversation import Turn
from d3tom_export.prompt.settings import PromptSettings
from tests.conftest import byte_tokenizer, picture, raw_config

GENERATION = GenerationConfig(gen_length=8)


def _reader(raw: dict[str, Any]) -> Reader:
    config = read_config(raw)
    return Reader(config, byte_tokenizer(), PromptSettings.of_family(family_of(config)))


def _record(ids: list[int], end: int) -> StepRecord:
    """An answer's last step."""
    tokens = np.array([ids])
    result = StepResult(tokens, np.ones(tokens.shape), None)
    return StepRecord(0, 0, 0, False, tokens, np.zeros(tokens.shape, np.bool_), np.array([end]), result)


@pytest.fixture(scope="module")
def reader(bundle: Bundle) -> Reader:
    return Reader.from_folder(bundle.folder, bundle.config)


def test_visual_tokens_stand_where_the_placeholder_stood(reader: Reader, oracle: PyTorchBackend) -> None:
    image = picture(60, 50)
    prompt = reader.read(oracle, "What?", [image], GENERATION)
    ids = reader.token_ids("What?", 1)
    at = ids.index(IMAGE_TOKEN_INDEX)
    visual = prepare_picture(image, reader.config.vision).packing.visual_tokens  # type: ignore[arg-type]
    assert prompt.visual_positions.tolist() == list(range(at, at + visual))
    assert prompt.embeddings.shape == (1, len(ids) - 1 + visual, 32)
    text = oracle.embed_tokens(np.array([ids[:at] + ids[at + 1 :]]))[0]
    assert np.array_equal(np.delete(prompt.embeddings[0], prompt.visual_positions, axis=0), text)
    # The last visual token closes the last row of tiles.
    assert np.array_equal(prompt.embeddings[0, at + visual - 1], oracle.image_newline)


def test_pictures_go_first_unless_the_question_places_them(reader: Reader) -> None:
    text = reader.tokenizer.decode([t for t in reader.token_ids("See <image> there.", 1) if t >= 0])
    assert "See  there." in text or "See there." in text
    assert reader.token_ids("Two?", 2).count(IMAGE_TOKEN_INDEX) == 2
    with pytest.raises(D3tomError, match=r"places 1 pictures .* and 2 were given"):
        reader.token_ids("<image>", 2)
    with pytest.raises(D3tomError, match=r"places 1 pictures .* and 0 were given"):
        reader.token_ids("<image>", 0)


def test_a_prompt_beyond_the_models_limit_is_refused(reader: Reader, oracle: PyTorchBackend) -> None:
    with pytest.raises(D3tomError, match=r"exceeds this model's limit of 640"):
        reader.read(oracle, "long " * 200, [picture(60, 60)], GENERATION)
    with pytest.raises(D3tomError, match="--gen-length"):
        reader.read(oracle, "short", [], GenerationConfig(gen_length=640))


def test_lengths_are_counted_without_preparing_a_picture(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(60, 50), (1, 1), (5000, 2), (2, 5000), (300, 100)]
    vision = reader.config.vision
    assert vision is not None
    counts = [prepare_picture(picture(*size), vision).packing.visual_tokens for size in sizes]
    monkeypatch.setattr(pipeline, "prepare_picture", None)
    assert [count_visual_tokens(size, vision) for size in sizes] == counts
    ids = reader.check_length("What?", [picture(60, 50)], GENERATION)
    assert ids == reader.token_ids("What?", 1)
    with pytest.raises(D3tomError, match="exceeds this model's limit of 640"):
        reader.check_length("What?", [picture(60, 50)] * 9, GENERATION)
    with pytest.raises(D3tomError, match=r"has at least \d+ tokens"):
        reader.check_text("What?", 40, GENERATION)


def test_views_are_read_as_their_picture(reader: Reader, oracle: PyTorchBackend, tmp_path: Path) -> None:
    image = picture(60, 50)
    image.save(tmp_path / "p.png")
    of_picture = reader.read(oracle, "What?", [image], GENERATION)
    of_views = reader.read(oracle, "What?", see(reader, [tmp_path / "p.png"], no_note).views, GENERATION)
    assert np.array_equal(of_picture.embeddings, of_views.embeddings)


def test_a_picture_that_was_seen_is_not_encoded_again(
    reader: Reader, oracle: PyTorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, encoded = oracle.encode_views, []

    def counted(pixel_values: np.ndarray) -> np.ndarray:
        encoded.append(len(pixel_values))
        return encode(pixel_values)

    monkeypatch.setattr(oracle, "encode_views", counted)
    first, other, seen = picture(60, 50), picture(50, 60, seed=1), SeenPictures()
    for question, pictures, looks in (
        ("What?", [first], 1),
        ("And why?", [first], 0),
        ("What?", [other], 1),
        ("Which of them?", [other, first], 0),
        ("Twice?", [picture(60, 50), picture(70, 50), picture(70, 50)], 1),  # by what they show
        ("What?", [], 0),
    ):
        alone = reader.read(oracle, question, pictures, GENERATION)
        encoded.clear()
        remembered = reader.read(oracle, question, pictures, GENERATION, seen)
        assert len(encoded) == looks, question
        assert np.array_equal(remembered.embeddings, alone.embeddings)
        assert np.array_equal(remembered.visual_positions, alone.visual_positions)


def test_a_readers_pictures_are_upright_unless_it_ignores_their_orientation(reader: Reader, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(112, 28).save(tmp_path / "p.jpg", exif=exif)
    (upright,) = see(reader, [tmp_path / "p.jpg"], no_note).views
    (stored,) = see(replace(reader, ignore_orientation=True), [tmp_path / "p.jpg"], no_note).views
    assert reader.config.vision is not None
    assert upright.packing.visual_tokens == count_visual_tokens((28, 112), reader.config.vision)
    assert stored.packing.visual_tokens == count_visual_tokens((112, 28), reader.config.vision)


def test_prompts_that_are_no_text_or_endless_are_refused_unread(reader: Reader) -> None:
    turns = (Turn("user", "a"), Turn("assistant", "caf\udce9"), Turn("user", "b"))
    with pytest.raises(D3tomError, match="not UTF-8 text: surrogates not allowed at character 3"):
        reader.token_ids(turns, 0)
    with pytest.raises(D3tomError, match="not UTF-8 text: surrogates not allowed at character 3"):
        reader.token_ids("caf\udce9", 0)
    with pytest.raises(D3tomError, match="has 5,000,000 characters, more than the 163,840"):
        reader.token_ids("word " * 10**6, 0)
    assert len(reader.token_ids("\x00\x1b[31m\r\u202e", 0)) > 0


def test_a_tokenizer_of_another_model_is_refused(reader: Reader, tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    small = read_config(raw_config(vocab_size=259, embedding_size=259))
    with pytest.raises(D3tomError, match="has 262 tokens and the model embeds 259"):
        Reader.from_folder(tmp_path, small)


def test_a_model_without_eyes_is_asked_as_plain_llada(reader: Reader) -> None:
    raw = {k: v for k, v in raw_config().items() if "vision" not in k} | {"model_type": "llada"}
    blind = _reader(raw)
    user = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    text = f"{user}<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert blind.token_ids("Hello", 0) == blind.tokenizer.encode(text, add_special_tokens=False).ids
    assert len(reader.token_ids("Hello", 0)) > len(blind.token_ids("Hello", 0)) + len("system")


def test_an_answer_is_what_stands_before_its_stop_and_the_suffix(reader: Reader) -> None:
    tokenizer = reader.tokenizer
    end = tokenizer.token_to_id("<|eot_id|>")
    ids = [*tokenizer.encode("!! A cat! ").ids, end, *tokenizer.encode(" On a mat.").ids]
    whole = _record(ids, len(ids))
    assert reader.answer(whole, GENERATION) == (ids, "!! A cat!")
    assert reader.answer(whole, GENERATION, raw=True) == (ids, " A cat!  On a mat.")
    stopped, suffix = _record(ids, 4), reader.suffix_ids(" ends")
    assert reader.answer(stopped, GENERATION) == (ids[:4], "!! A")
    followed = replace(GENERATION, suffix_ids=suffix)
    assert reader.answer(stopped, followed) == ([*ids[:4], *suffix], "!! A ends")
    assert reader.answer(whole, followed).text == "!! A cat!  ends"
    assert reader.answer(stopped, followed, raw=True).text == " A ends"


def test_stops_and_suffix_are_ids(reader: Reader) -> None:
    end = reader.tokenizer.token_to_id("<|eot_id|>")
    assert reader.stop_ids(["<|eot_id|>", "a"]) == ((end,), tuple(reader.tokenizer.encode("a").ids))
    with pytest.raises(D3tomError, match="The stop text '' is no token"):
        reader.stop_ids(["a", ""])
    with pytest.raises(D3tomError, match="The suffix '' is no token"):
        reader.suffix_ids("")


def test_a_suffix_counts_for_the_models_limit(reader: Reader) -> None:
    length = len(reader.check_length("What?", [], GENERATION))
    fits = replace(GENERATION, suffix_ids=(1,) * (640 - 8 - length))
    reader.check_length("What?", [], fits)
    with pytest.raises(D3tomError, match=r"with 8 answer tokens and \d+ of its suffix that exceeds"):
        reader.check_length("What?", [], replace(fits, suffix_ids=(*fits.suffix_ids, 1)))


def test_a_conversation_is_asked_as_a_question_is(reader: Reader) -> None:
    assert reader.token_ids((Turn("user", "What?"),), 1) == reader.token_ids("What?", 1)
    system = reader.prompt.system
    assert system is not None
    other = replace(reader, prompt=replace(reader.prompt, system="Be brief."))
    assert other.token_ids("What?", 1) == reader.token_ids((Turn("system", "Be brief."), Turn("user", "What?")), 1)
    assert other.token_ids("What?", 1) != reader.token_ids("What?", 1)


def test_a_template_places_no_picture(reader: Reader) -> None:
    template = replace(reader.prompt.template, before_system="<image>")
    with pytest.raises(D3tomError, match="chat template places pictures of its own"):
        replace(reader, prompt=replace(reader.prompt, template=template)).token_ids("What?", 0)


def test_what_the_original_would_cut_is_refused() -> None:
    config = _reader(raw_config()).config
    language = replace(config.language, max_prompt_length=330)
    limited = replace(_reader(raw_config()), config=replace(config, language=language))
    limited.check_length("What?", [picture(30, 30)], GENERATION)
    with pytest.raises(D3tomError, match=r"has at least \d+ tokens .* and this model reads 330: the original cuts"):
        limited.check_text("word " * 40, 1, GENERATION)


def test_several_pictures_are_squares_where_the_original_shows_them_so(oracle: PyTorchBackend, tmp_path: Path) -> None:
    config = _reader(raw_config()).config
    assert config.vision is not None
    reader = replace(_reader(raw_config()), config=replace(config, vision=replace(config.vision, pads_several=True)))
    for number, size in enumerate(((30, 60), (50, 20))):
        picture(*size, seed=number).save(tmp_path / f"{number}.png")
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    seen = see(reader, paths, no_note).views
    assert [views.pixel_values.shape for views in seen] == [(1, 3, 28, 28)] * 2
    per_view = config.vision.tokens_per_view
    assert [views.packing.rows[:, 0].tolist() for views in seen] == [list(range(per_view + 1))] * 2
    of_files, of_pictures = (
        reader.read(oracle, "Compare <image> with <image>.", pictures, GENERATION)
        for pictures in (seen, [picture(30, 60, seed=0), picture(50, 20, seed=1)])
    )
    assert np.array_equal(of_files.embeddings, of_pictures.embeddings)
    assert len(of_files.visual_positions) == 2 * (per_view + 1)
    # A square of the mean colour, the picture in its middle: SigLIP's normalisation makes that colour next to nothing.
    corner = seen[0].pixel_values[0, :, :, :5]
    assert np.abs(corner).max() < 0.01
    alone = see(reader, paths[:1], no_note).views[0]
    assert len(alone.pixel_values) > 1, "one picture by itself is spread over its canvas"


def test_a_language_only_model_reads_no_pictures(oracle: PyTorchBackend) -> None:
    raw = {k: v for k, v in raw_config().items() if "vision" not in k}
    reader = _reader(raw)
    with pytest.raises(D3tomError, match="language-only"):
        reader.read(oracle, "What?", [picture(30, 30)], GENERATION)
    with pytest.raises(D3tomError, match="language-only"):
        reader.check_text("What?", 1, GENERATION)
