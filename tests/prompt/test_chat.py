"""Tokenizer quirks and answers' text."""

from __future__ import annotations

from pathlib import Path

import pytest

from d3tom_export.errors import D3tomError
from d3tom_export.families import lavida_dream, lavida_llada
from d3tom_export.prompt.chat import IMAGE_TOKEN_INDEX, answer_text, load_tokenizer, text_ids, tokenize
from d3tom_export.prompt.conversation import conversation, joined
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
BOS = lavida_llada.FAMILY.bos


def _id(token: str) -> int:
    found = TOKENIZER.token_to_id(token)
    assert found is not None
    return found


def chat(question: str) -> str:
    family = lavida_llada.FAMILY
    return joined(family.template, conversation(question, family.system))


def test_the_token_after_a_picture_is_dropped_as_released() -> None:
    text = chat("<image>\nWhat?")
    plain = TOKENIZER.encode(text.replace("<image>", ""), add_special_tokens=False).ids
    kept = tokenize(TOKENIZER, text, bos=BOS, drop_token_after_image=False)
    dropped = tokenize(TOKENIZER, text, bos=BOS)
    at = kept.index(IMAGE_TOKEN_INDEX)
    assert [token for token in kept if token != IMAGE_TOKEN_INDEX] == plain
    assert TOKENIZER.decode([kept[at + 1]]) == "\n"
    assert dropped == kept[: at + 1] + kept[at + 2 :]


@pytest.mark.parametrize("bos", [BOS, None, "<|eot_id|>", lavida_dream.FAMILY.bos])
def test_nothing_is_dropped_where_the_prompt_does_not_begin_with_bos(bos: str | None) -> None:
    assert tokenize(TOKENIZER, "a<image>b", bos=bos) == [_id("a"), IMAGE_TOKEN_INDEX, _id("b")]
    if bos != BOS:
        text = f"{BOS}<image>b"
        assert tokenize(TOKENIZER, text, bos=bos) == [_id(BOS), IMAGE_TOKEN_INDEX, _id("b")]


def test_text_without_a_picture_is_left_alone() -> None:
    text = chat("Hello")
    assert tokenize(TOKENIZER, text, bos=BOS) == TOKENIZER.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("stop", ["<|eot_id|>", "<|endoftext|>"])
def test_answers_end_at_the_first_end_token_and_go_on_with_the_suffix(stop: str) -> None:
    ends = {_id("<|eot_id|>"), _id("<|endoftext|>")}
    ids = [_id("4"), _id("2"), _id(stop), _id("7")]
    assert answer_text(TOKENIZER, ids, ends) == "42"
    assert answer_text(TOKENIZER, ids, {*ends, _id("2")}) == "4"
    assert answer_text(TOKENIZER, ids, ends, text_ids(TOKENIZER, " it is. ", "x")) == "42 it is."


def test_stops_are_the_tokens_that_they_spell_out() -> None:
    assert text_ids(TOKENIZER, "<|eot_id|>", "The stop") == (_id("<|eot_id|>"),)
    assert text_ids(TOKENIZER, "ab<|eot_id|>", "The stop") == (_id("a"), _id("b"), _id("<|eot_id|>"))
    for text, says in (
        ("", "The stop '' is no token of this model's tokenizer"),
        ("\udce9", "The stop is not UTF-8 text"),
        ("x" * 5000, "The stop has 5,000 characters"),
    ):
        with pytest.raises(D3tomError, match=says):
            text_ids(TOKENIZER, text, "The stop")


def test_a_tokenizer_is_there_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    assert load_tokenizer(path).get_vocab_size() == 262
    path.write_text("{")
    with pytest.raises(D3tomError, match="not a tokenizer"):
        load_tokenizer(path)
    with pytest.raises(D3tomError, match="does not exist"):
        load_tokenizer(tmp_path / "none.json")
