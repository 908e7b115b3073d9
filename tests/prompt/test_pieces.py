"""Half-denoised answers as pieces of text."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from d3tom_export.loop.denoise import StepRecord, StepResult
from d3tom_export.prompt.chat import answer_parts
from d3tom_export.prompt.pieces import Piece, Said, mask_block, pieces_of, said
from d3tom_export.trust.terminal import legible
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
"""Every byte is a token."""

MASK, END = (TOKENIZER.token_to_id(token) for token in ("<|mdm_mask|>", "<|eot_id|>"))
EURO = TOKENIZER.encode("€").ids


def _ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def _pieces(ids: list[int], new: tuple[int, ...] = (), encoding: str = "utf-8") -> list[Piece]:
    return pieces_of(Said(ids, [at in new for at in range(len(ids))]), TOKENIZER, MASK, encoding)


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_masks_are_blocks_and_what_was_just_committed_is_new() -> None:
    assert _pieces([*_ids("ab"), MASK, MASK, *_ids("c")], new=(1,)) == [
        ("a", "said"), ("b", "new"), ("░░", "mask"), ("c", "said"),
    ]  # fmt: skip
    assert _pieces([]) == []
    assert _pieces([MASK] * 3) == [("░░░", "mask")]


def test_a_character_is_a_block_until_all_of_its_bytes_are_committed() -> None:
    a, b, c = EURO
    assert _pieces([a, MASK, MASK], new=(0,)) == [("░", "mask"), ("░░", "mask")]
    assert _pieces([a, b, MASK]) == [("░", "mask"), ("░", "mask")]
    assert _pieces([MASK, b, c, *_ids("!")]) == [("░", "mask"), ("░░", "mask"), ("!", "said")]
    assert _pieces([MASK, MASK, c]) == [("░░", "mask"), ("░", "mask")]
    assert _pieces([*_ids("x"), a, b, MASK, *_ids("y")]) == [
        ("x", "said"), ("░", "mask"), ("░", "mask"), ("y", "said"),
    ]  # fmt: skip
    assert _pieces([MASK, *EURO, MASK]) == [("░", "mask"), ("€", "said"), ("░", "mask")]
    assert _pieces(EURO, new=(2,)) == [("€", "new")]
    # No mask is left that could complete it: so it will be in the answer.
    assert _text(_pieces([a, *_ids("x"), MASK])) == "\ufffdx░"
    assert _text(_pieces([*_ids("x"), a])) == "x\ufffd"


def test_special_tokens_are_not_drawn() -> None:
    assert _pieces([*_ids("a"), END, *_ids("b")], new=(1,)) == [("a", "said"), ("b", "said")]


def test_nothing_that_a_terminal_obeys_is_drawn() -> None:
    ids = [*_ids("\x1b"), MASK, *_ids("[31mred\r\t\u202e\x07\n")]
    text = _text(_pieces(ids))
    assert text == "\\x1b░[31mred\\r    \\u202e\\x07\n"
    assert _text(_pieces([*_ids("é€"), MASK], encoding="ascii")) == "\\xe9\\u20ac_"
    assert _text(_pieces([*_ids("é€"), MASK], encoding="latin-1")) == "é\\u20ac_"
    assert mask_block("cp437") == "░"


@given(st.lists(st.sampled_from([*range(256), *[MASK] * 64, *EURO * 16, END]), max_size=40), st.integers(0, 2**40))
def test_any_tokens_can_be_drawn_and_whole_answers_are_their_text(ids: list[int], bits: int) -> None:
    new = tuple(at for at in range(len(ids)) if bits >> at & 1)
    text = _text(_pieces(ids, new))
    assert all(c.isprintable() or c == "\n" or ord(c) > 0x9F for c in text)
    whole = [token for token in ids if token != MASK]
    decoded = TOKENIZER.decode(whole, skip_special_tokens=True)
    assert _text(_pieces(whole, new)) == legible(decoded).replace("\t", "    ")
    assert sum(tokens for _, tokens in answer_parts(TOKENIZER, whole)) == len(whole)
    _text(_pieces(ids, new, "ascii")).encode("ascii")


def _sentencepiece() -> Tokenizer:
    """A tokenizer whose decoder takes a blank from whatever comes first, and puts bytes together."""
    words = ["▁a", "▁b", *(f"<0x{byte:02X}>" for byte in "€".encode())]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def test_blanks_between_tokens_stay_whatever_the_decoder_does_to_the_first() -> None:
    parts = answer_parts(_sentencepiece(), [0, 1, 2, 3, 4, 1])
    assert parts == [("a", 1), (" b", 1), ("€", 3), (" b", 1)]


def _record(ids: list[int], end: int, new: int) -> StepRecord:
    tokens = np.array([ids, [MASK] * len(ids)])
    transfer = np.zeros(tokens.shape, np.bool_)
    transfer[0, new] = True
    result = StepResult(tokens, np.ones(tokens.shape), None)
    return StepRecord(0, 0, 0, False, tokens, transfer, np.array([end, len(ids)]), result)


def test_what_is_behind_an_end_or_a_stop_is_not_drawn() -> None:
    ids = [*_ids("ab"), MASK, END, *_ids("c"), MASK]
    assert said(_record(ids, 6, 1), {END}) == (ids[:3], [False, True, False])
    assert said(_record(ids, 1, 0), {END}) == (ids[:1], [True])
    assert said(_record(ids, 6, 4), ()) == (ids, [False, False, False, False, True, False])
