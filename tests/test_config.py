"""Settings that cannot work are refused with their name and what would."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.checkpoint.folder import default_generation
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.families.registry import read_config
from tests.conftest import raw_config


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ratio": 1.0}, r"ratio 1.0 is outside \[0, 1\)"),
        ({"ratio": -0.1}, "outside"),
        ({"ratio": float("nan")}, "outside"),
        ({"schedule": "linear"}, "merge schedule is 'linear', expected one of adaptive, fixed, none"),
        ({"select": "best"}, "selection policy"),
        ({"aggregate": "max"}, "aggregation"),
        ({"positions": "none"}, "positions after merging"),
        ({"ratio": "0.5"}, "merge ratio is '0.5', expected a number"),
        ({"layer": None}, "merge layer is None, expected a number"),
        ({"layer": True}, "merge layer is True, expected a number"),
    ],
)
def test_merge_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(D3tomError, match=says):
        MergeConfig(**{"layer": 0, "ratio": 0.5, **settings})


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_merge_layer(layer: int) -> None:
    with pytest.raises(D3tomError, match="it has 4 layers, so --layer takes 0 to 3"):
        MergeConfig(layer, 0.5).check_layer(4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gen_length": 0}, "at least 1"),
        ({"gen_length": 10, "block_length": 3}, "block length 3 does not divide the answer length 10"),
        ({"gen_length": 4, "step_ratio": 0.1}, "leaves no step"),
        ({"gen_length": 4, "step_ratio": 1e308}, r"in \(0, 1\]"),
        ({"gen_length": 4, "step_ratio": 1.5}, r"in \(0, 1\]"),
        ({"gen_length": 4, "shift": 0.0}, "shift is 0.0"),
        ({"gen_length": 4, "shift": 1e39}, r"in \[0.001, 1000\]"),
        ({"gen_length": 4, "shift": float("nan")}, "shift is nan, expected a finite number"),
        ({"gen_length": 4, "temperature": float("inf")}, "temperature is inf, expected a finite number"),
        ({"gen_length": "8"}, "gen_length is '8', expected an integer"),
        ({"gen_length": 4, "step_ratio": "0.5"}, "step_ratio is '0.5'"),
        ({"gen_length": 4, "temperature": -1.0}, "temperature is -1.0"),
        ({"gen_length": 4, "seed": -1}, "seed is -1"),
        ({"gen_length": 4, "remasking": "entrophy"}, "remasking is 'entrophy'"),
        ({"gen_length": 4, "schedule": "quadratic"}, "step schedule is 'quadratic'"),
    ],
)
def test_generation_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(D3tomError, match=says):
        GenerationConfig(**settings)


MODEL = read_config(raw_config(max_sequence_length=640))


def _answers(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


def test_a_checkpoints_own_settings_are_taken(tmp_path: Path) -> None:
    assert default_generation(MODEL, tmp_path) == default_generation(MODEL)
    own = {"max_new_tokens": 32, "step_ratio": 1.0, "remasking": "entrophy", "eos_token_id": 2, "do_sample": "no"}
    generation = default_generation(MODEL, _answers(tmp_path, own))
    assert (generation.gen_length, generation.step_ratio, generation.remasking) == (32, 1.0, "entropy")
    assert default_generation(MODEL, _answers(tmp_path, {"max_new_tokens": None})).gen_length == 64


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"max_new_tokens": 10**15}, "max_new_tokens is 1,000,000,000,000,000, and the model has 640 positions"),
        ({"max_new_tokens": 640}, "the model has 640 positions"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": True}, "gen_length is True"),
        ({"max_new_tokens": "64"}, "gen_length is '64'"),
        ({"block_length": [4]}, r"block_length is \[4\]"),
        ({"step_ratio": {}}, "step_ratio is {}"),
        ({"schedule": ["shift"]}, r"step schedule is \['shift'\]"),
        ({"shift": 1e300}, r"in \[0.001, 1000\]"),
        ({"remasking": {"a": 1}}, "remasking is {'a': 1}"),
    ],
)
def test_settings_of_a_checkpoint_that_cannot_work(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    with pytest.raises(D3tomError, match=rf"generation_config\.json cannot be followed\. .*{says}"):
        default_generation(MODEL, _answers(tmp_path, content))


def test_settings_that_are_there_must_be_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(D3tomError, match="a named pipe"):
        default_generation(MODEL, tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").symlink_to("nothing")
    with pytest.raises(D3tomError, match="a link to nothing"):
        default_generation(MODEL, tmp_path)


@pytest.mark.parametrize(
    ("fields", "vocab_rows", "rows"),
    [
        ({}, 262, (262, 272)),  # LLaDA's config.json: transformers' default is true
        ({"tie_word_embeddings": True}, 262, (262, 272)),
        ({"tie_word_embeddings": False}, 262, (262, 262)),
        ({"tie_word_embeddings": False}, None, (272, 272)),
        ({}, None, (272, 272)),
        ({}, 400, (272, 272)),
    ],
)
def test_rows_of_the_table_and_of_the_head(
    fields: dict[str, Any], vocab_rows: int | None, rows: tuple[int, int]
) -> None:
    language = read_config(raw_config(**fields), vocab_rows).language
    assert (language.vocab_rows, language.head_rows) == rows


def test_null_unties_as_in_the_release() -> None:
    """transformers asks ``not config.tie_word_embeddings``."""
    raw = raw_config() | {"tie_word_embeddings": None}
    assert read_config(raw, 262).language.head_rows == 262


def test_tying_that_is_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(D3tomError, match="tie_word_embeddings is 'false', expected true or false"):
        read_config(raw_config(tie_word_embeddings="false"))
