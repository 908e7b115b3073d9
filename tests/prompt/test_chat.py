"""Chat template, tokenizer quirks and answers' text."""

from __future__ import annotations

from pathlib import Path

import pytest

from d3tom_export.errors import D3tomError
from d3tom_export.prompt.chat import (
    IMAGE_TOKEN_INDEX,
    SYSTEM_PROMPT,
    answer_text,
    chat,
    load_tokenizer,
    tokenize,
    vocabulary_size,
)
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()


def _id(token: str) -> int:
    found = TOKENIZER.token_to_id(token)
    assert found is not None
    return found


def test_chat_is_the_released_template() -> None:
    assert chat(" Hello? ") == (
        f"<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM_PROMPT}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_token_after_a_picture_is_dropped_as_released() -> None:
    text = chat("<image>\nWhat?")
    plain = TOKENIZER.encode(text.replace("<image>", ""), add_special_tokens=False).ids
    kept = tokenize(TOKENIZER, text, drop_token_after_image=False)
    dropped = tokenize(TOKENIZER, text)
    at = kept.index(IMAGE_TOKEN_INDEX)
    assert [token for token in kept if token != IMAGE_TOKEN_INDEX] == plain
    assert TOKENIZER.decode([kept[at + 1]]) == "\n"
    assert dropped == kept[: at + 1] + kept[at + 2 :]


def test_nothing_is_dropped_where_the_prompt_does_not_begin_with_bos() -> None:
    assert tokenize(TOKENIZER, "a<image>b") == [_id("a"), IMAGE_TOKEN_INDEX, _id("b")]


def test_text_without_a_picture_is_left_alone() -> None:
    text = chat("Hello")
    assert tokenize(TOKENIZER, text) == TOKENIZER.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("stop", ["<|eot_id|>", "<|endoftext|>"])
def test_answers_end_at_the_first_stop(stop: str) -> None:
    ids = [_id("4"), _id("2"), _id(stop), _id("7")]
    assert answer_text(TOKENIZER, ids, []) == "42"
    assert answer_text(TOKENIZER, ids, [_id("2")]) == "4"


def test_vocabulary_counts_added_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    assert vocabulary_size(path) == 262
    path.write_text("{")
    with pytest.raises(D3tomError, match="not a tokenizer"):
        load_tokenizer(path)
    with pytest.raises(D3tomError, match="does not exist"):
        load_tokenizer(tmp_path / "none.json")
