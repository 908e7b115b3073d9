"""A prompt's text to ids, an answer's ids to text: the released tokenizer quirks (lavida.md C). No framework."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer

from d3tom_export.errors import D3tomError, printable
from d3tom_export.prompt.conversation import IMAGE_PLACEHOLDER
from d3tom_export.trust.files import find_inside, is_there
from d3tom_export.trust.vocabularies import guarded, read_tokenizer

T = TypeVar("T")

IMAGE_TOKEN_INDEX = -200
"""Stands in the prompt's ids where a picture's visual tokens go, as in the release."""

CUT_CHARACTER = "\ufffd"
"""What tokenizers write for bytes that are no character, such as a part of one."""

_LONGEST_PIECE = 4096
"""Characters of a text that ends an answer, or stands behind it."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json`` as transformers does: stored truncation and padding are switched off.

    Raises :class:`D3tomError` where there is none, or where it cannot be used (:mod:`d3tom_export.trust.vocabularies`).
    """
    if not is_there(path.parent, path.name):
        raise D3tomError(f"{path} does not exist. A prompt cannot be read without it; put the model's tokenizer there.")
    return read_tokenizer(find_inside(path.parent, path.name))


def tokenize(
    tokenizer: Tokenizer, text: str, *, bos: str | None = None, drop_token_after_image: bool = True
) -> list[int]:
    """Ids of ``text`` as transformers gives them, with :data:`IMAGE_TOKEN_INDEX` for each ``<image>``.

    Each chunk between pictures is encoded by itself and the tokenizer's post-processor applied, so one that begins
    every text with a beginning-of-text token does so here. Special tokens that ``text`` spells out are those tokens,
    whoever wrote them.

    ``drop_token_after_image`` is the release's quirk: the helper that joins the chunks takes the first token of every
    chunk for a second beginning-of-text and drops it, so the newline after a picture never reaches the model, unless
    the post-processor gave that chunk a beginning to be dropped (lavida.md C3). It does so where the prompt begins with
    ``bos``, the model's beginning-of-text token. False keeps all tokens of the text; what a post-processor adds then
    stands around the first chunk only.
    """
    first, *others = text.split(IMAGE_PLACEHOLDER)
    ids = _encode(tokenizer, first, special=True)
    begins_with_bos = bos is not None and bool(ids) and ids[0] == tokenizer.token_to_id(bos)
    skipped = 1 if drop_token_after_image and begins_with_bos else 0
    for chunk in others:
        ids = [*ids, IMAGE_TOKEN_INDEX, *_encode(tokenizer, chunk, special=drop_token_after_image)[skipped:]]
    return ids


def text_ids(tokenizer: Tokenizer, text: str, what: str) -> tuple[int, ...]:
    """Ids of ``text`` by itself, nothing added; special tokens that it spells out are those tokens.

    Raises :class:`D3tomError`, which calls it ``what``, where there are none.
    """
    check_text(text, _LONGEST_PIECE, what)
    ids = tuple(_encode(tokenizer, text, special=False))
    if not ids:
        raise D3tomError(f"{what} {text!r} is no token of this model's tokenizer. Give it some text, or leave it out.")
    return ids


def _encode(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    try:
        ids: list[int] = guarded(lambda: tokenizer.encode(text, add_special_tokens=special).ids)
    except ValueError as error:
        raise D3tomError(
            f"The model's tokenizer cannot read this prompt: {printable(str(error), 300)}. Ask in other words, or "
            "fetch the tokenizer again."
        ) from None
    return ids


def check_text(text: str, longest: int, what: str = "The prompt") -> None:
    """Refuse a prompt that is no text, or of more than ``longest`` characters, before it is encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise D3tomError(
            f"{what} is not UTF-8 text: {error.reason} at character {error.start}. Give it in UTF-8, the encoding "
            "of the terminal's locale."
        ) from None
    if len(text) > longest:
        raise D3tomError(
            f"{what} has {len(text):,} characters, more than the {longest:,} that could fit this model. Shorten it."
        )


def answer_text(
    tokenizer: Tokenizer, ids: Sequence[int], end_ids: Container[int], suffix_ids: Sequence[int] = ()
) -> str:
    """Text of an answer up to its first end token, and of the suffix behind it, without blanks around them."""
    end = next((index for index, token in enumerate(ids) if token in end_ids), len(ids))
    return decode(tokenizer, [*ids[:end], *suffix_ids]).strip()


def raw_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of all of an answer's ids as the release prints it: special tokens skipped, leading "!" stripped.

    "!" is what id 0 says, and the release's answers begin with the prompt's zeros.
    """
    return decode(tokenizer, ids).lstrip("!")


def answer_parts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, int]]:
    """Text of ``ids``, without special tokens, in parts of as few tokens each as make whole characters.

    With each part how many tokens it is of. Bytes that become no character with what follows are
    :data:`CUT_CHARACTER`, at the end of the last part for one.
    """
    return _guarded(lambda: list(_parts(tokenizer, list(ids))))


def _parts(tokenizer: Tokenizer, ids: list[int]) -> Iterator[tuple[str, int]]:
    # Each is decoded behind the one before it: some tokenizers take a blank from whatever comes first.
    before = start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[before:end], skip_special_tokens=True)
        if text.endswith(CUT_CHARACTER) and end < len(ids):
            continue
        context = tokenizer.decode(ids[before:start], skip_special_tokens=True)
        yield text[len(context) :], end - start
        before, start = start, end


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ``ids`` without special tokens. Raises :class:`D3tomError` where the tokenizer cannot write it."""
    return _guarded(lambda: str(tokenizer.decode(list(ids), skip_special_tokens=True)))


def _guarded(write: Callable[[], T]) -> T:
    try:
        return guarded(write)
    except ValueError as error:
        raise D3tomError(
            f"The model's tokenizer cannot write this answer: {printable(str(error), 300)}. Fetch it again; --json "
            "gives the answer's token ids."
        ) from None
