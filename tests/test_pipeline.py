"""Prompts from questions and pictures."""

from __future__ import annotations

import numpy as np
import pytest

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle import Bundle
from d3tom_export.config import GenerationConfig, ModelConfig
from d3tom_export.errors import D3tomError
from d3tom_export.pictures import prepare_picture
from d3tom_export.pipeline import Reader
from d3tom_export.prompt import IMAGE_TOKEN_INDEX
from tests.conftest import byte_tokenizer, picture, raw_config

GENERATION = GenerationConfig(gen_length=8)


@pytest.fixture(scope="module")
def reader(bundle: Bundle) -> Reader:
    return Reader.from_folder(bundle.folder, bundle.config)


def test_visual_tokens_stand_where_the_placeholder_stood(reader: Reader, oracle: PyTorchBackend) -> None:
    image = picture(60, 50)
    prompt = reader.read(oracle, "What?", [image], GENERATION)
    ids = reader.token_ids("What?", 1)
    at = ids.index(IMAGE_TOKEN_INDEX)
    visual = len(prepare_picture(image, reader.config.vision).packing)  # type: ignore[arg-type]
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


def test_a_language_only_model_reads_no_pictures(oracle: PyTorchBackend) -> None:
    raw = {k: v for k, v in raw_config().items() if "vision" not in k}
    reader = Reader(ModelConfig.from_json(raw), byte_tokenizer())
    with pytest.raises(D3tomError, match="language-only"):
        reader.read(oracle, "What?", [picture(30, 30)], GENERATION)
