"""Prompts in, text out: the released chat template and tokenizer quirks (lavida.md C). Imports no framework."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from d3tom_export.errors import D3tomError, printable
from d3tom_export.trust.files import find_inside, is_there
from d3tom_export.trust.vocabularies import guarded, read_tokenizer

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
    """Read a ``tokenizer.json`` as transformers does: stored truncation and padding are switched off.

    Raises :class:`D3tomError` where there is none, or where it cannot be used (:mod:`d3tom_export.trust.vocabularies`).
    """
    if not is_there(path.parent, path.name):
        raise D3tomError(f"{path} does not exist. A prompt cannot be read without it; put the model's tokenizer there.")
    return read_tokenizer(find_inside(path.parent, path.name))


def vocabulary_size(path: Path) -> int:
    """Number of ids of a ``tokenizer.json``, added tokens included: what the release cuts the embedding table to."""
    return load_tokenizer(path).get_vocab_size(with_added_tokens=True)


def system_text(has_eyes: bool) -> str | None:
    """What the system turn says: LaViDa's text for a model with eyes; plain LLaDA's own code has no such turn."""
    return SYSTEM_PROMPT if has_eyes else None


def chat(question: str, system: str | None = SYSTEM_PROMPT) -> str:
    """The conversation up to the assistant's answer, in the released template; ``system`` None leaves that turn out."""
    turns = [("user", question)] if system is None else [("system", system), ("user", question)]
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
    """Ids of ``text`` as transformers gives them, with :data:`IMAGE_TOKEN_INDEX` for each ``<image>``.

    Each chunk between pictures is encoded by itself and the tokenizer's post-processor applied, so one that begins
    every text with a beginning-of-text token does so here. Special tokens that ``text`` spells out are those tokens,
    whoever wrote them.

    ``drop_token_after_image`` is the release's quirk: the helper that joins the chunks takes the first token of every
    chunk for a second beginning-of-text and drops it, so the newline after a picture never reaches the model, unless
    the post-processor gave that chunk a beginning to be dropped (lavida.md C3). False keeps all tokens of the text;
    what a post-processor adds then stands around the first chunk only.
    """

    def encode(chunk: str, special: bool) -> list[int]:
        try:
            ids: list[int] = guarded(lambda: tokenizer.encode(chunk, add_special_tokens=special).ids)
        except ValueError as error:
            raise D3tomError(
                f"The model's tokenizer cannot read this prompt: {printable(str(error), 300)}. Ask in other words, or "
                "fetch the tokenizer again."
            ) from None
        return ids

    first, *others = text.split(IMAGE_PLACEHOLDER)
    ids = encode(first, True)
    begins_with_bos = bool(ids) and ids[0] == tokenizer.token_to_id(_BOS)
    skipped = 1 if drop_token_after_image and begins_with_bos else 0
    for chunk in others:
        ids = [*ids, IMAGE_TOKEN_INDEX, *encode(chunk, drop_token_after_image)[skipped:]]
    return ids


def check_text(text: str, longest: int) -> None:
    """Refuse a prompt that is no text, or of more than ``longest`` characters, before it is encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise D3tomError(
            f"The prompt is not UTF-8 text: {error.reason} at character {error.start}. Give it in UTF-8, the encoding "
            "of the terminal's locale."
        ) from None
    if len(text) > longest:
        raise D3tomError(
            f"The prompt has {len(text):,} characters, more than the {longest:,} that could fit this model. Shorten it."
        )


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """Text of an answer up to its first end-of-turn or end-of-text token, without blanks around it."""
    stops = {*stop_ids, tokenizer.token_to_id(_END_OF_TURN), tokenizer.token_to_id("<|endoftext|>")}
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return _decode(tokenizer, ids[:end]).strip()


def raw_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of all of an answer's ids as the release prints it: special tokens skipped, leading "!" stripped.

    "!" is what id 0 says, and the release's answers begin with the prompt's zeros.
    """
    return _decode(tokenizer, ids).lstrip("!")


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    try:
        text: str = guarded(lambda: tokenizer.decode(list(ids), skip_special_tokens=True))
    except ValueError as error:
        raise D3tomError(
            f"The model's tokenizer cannot write this answer: {printable(str(error), 300)}. Fetch it again; --json "
            "gives the answer's token ids."
        ) from None
    return text
