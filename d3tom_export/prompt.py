"""Prompts in, text out: the released chat template and tokenizer quirks (lavida.md C). Imports no framework."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from d3tom_export.errors import D3tomError

IMAGE_PLACEHOLDER = "<image>"
IMAGE_TOKEN_INDEX = -200
"""Stands in the prompt's ids where a picture's visual tokens go, as in the release."""

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""The released system text of conversation ``llada``."""

_BOS, _END_OF_TURN = "<|startoftext|>", "<|eot_id|>"


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``."""
    if not path.exists():
        raise D3tomError(f"{path} does not exist. A prompt cannot be read without it; put the model's tokenizer there.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every defect
        raise D3tomError(f"{path} is not a tokenizer that can be read: {error}. Fetch the file again.") from None


def vocabulary_size(path: Path) -> int:
    """Number of ids of a ``tokenizer.json``, added tokens included: what the release cuts the embedding table to."""
    return load_tokenizer(path).get_vocab_size(with_added_tokens=True)


def chat(question: str) -> str:
    """The conversation up to the assistant's answer, in the released template."""
    turns = (("system", SYSTEM_PROMPT), ("user", question))
    text = "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}{_END_OF_TURN}" for role, content in turns
    )
    return f"{_BOS}{text}<|start_header_id|>assistant<|end_header_id|>\n\n"


def with_pictures(question: str, pictures: int) -> str:
    """A user turn that shows ``pictures`` pictures: first, each on a line of its own, unless it places them itself."""
    placed = question.count(IMAGE_PLACEHOLDER)
    if not placed:
        return f"{IMAGE_PLACEHOLDER}\n" * pictures + question
    if placed != pictures:
        raise D3tomError(
            f"The prompt places {placed} pictures with {IMAGE_PLACEHOLDER} and {pictures} were given. "
            "Give one --image for each, in order."
        )
    return question


def tokenize(tokenizer: Tokenizer, text: str, *, drop_token_after_image: bool = True) -> list[int]:
    """Ids of ``text``, with :data:`IMAGE_TOKEN_INDEX` for each ``<image>``.

    ``drop_token_after_image`` is the release's quirk: the helper that joins the chunks takes the first token of every
    chunk for a second beginning-of-text and drops it, so the newline after a picture never reaches the model
    (lavida.md C3). False keeps it.
    """
    chunks = [tokenizer.encode(chunk, add_special_tokens=False).ids for chunk in text.split(IMAGE_PLACEHOLDER)]
    begins_with_bos = bool(chunks[0]) and chunks[0][0] == tokenizer.token_to_id(_BOS)
    skipped = 1 if drop_token_after_image and begins_with_bos else 0
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, IMAGE_TOKEN_INDEX, *chunk[skipped:]]
    return ids


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """Text of an answer up to its first end-of-turn or end-of-text token."""
    stops = {*stop_ids, tokenizer.token_to_id(_END_OF_TURN), tokenizer.token_to_id("<|endoftext|>")}
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(list(ids[:end]), skip_special_tokens=True).strip()
