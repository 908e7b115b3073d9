"""A checkpoint's tokenizer: its ``tokenizer.json``, or one that is built where a slow tokenizer's files stand for it.

Those are ``vocab.json``, ``merges.txt`` and what ``tokenizer_config.json`` says under ``added_tokens_decoder``; the
code that a checkpoint brings for them is not run. What is built goes into a bundle as its ``tokenizer.json``, so that
nothing behind the build knows the difference (spec-lavida-dream.md, 4). Imports no framework.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from d3tom_export.config import TOKENIZER_FILE
from d3tom_export.errors import D3tomError, printable
from d3tom_export.families.family import Family
from d3tom_export.prompt.chat import load_tokenizer
from d3tom_export.trust.documents import read_json
from d3tom_export.trust.fields import shown
from d3tom_export.trust.files import find_inside, is_there, read_bytes
from d3tom_export.trust.vocabularies import checked_tokenizer

VOCABULARY_FILE, MERGES_FILE, ADDED_TOKENS_FILE = "vocab.json", "merges.txt", "tokenizer_config.json"

_MOST_BYTES = 16 << 20
"""Of a vocabulary or its merges. Those of Qwen2, of 152,000 tokens, have 3 and 2 MB."""

_MOST_ADDED = 4096
"""Added tokens. Qwen2 and Dream have some twenty."""

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def is_built(folder: Path, family: Family) -> bool:
    """Whether a checkpoint's tokenizer is one that has to be built."""
    return (
        family.byte_level_bpe is not None and not is_there(folder, TOKENIZER_FILE) and is_there(folder, VOCABULARY_FILE)
    )


def has_tokenizer(folder: Path, family: Family) -> bool:
    """Whether a checkpoint can read prompts."""
    return is_there(folder, TOKENIZER_FILE) or is_built(folder, family)


def open_tokenizer(folder: Path, family: Family) -> Tokenizer:
    """The tokenizer of a checkpoint or bundle. Raises :class:`D3tomError` where there is none that can be used."""
    if is_built(folder, family):
        return _built(folder, family)[1]
    return load_tokenizer(folder / TOKENIZER_FILE)


def vocabulary_size(folder: Path, family: Family) -> int:
    """Number of ids, added tokens included: what the release cuts the embedding table to."""
    return open_tokenizer(folder, family).get_vocab_size(with_added_tokens=True)


def built_tokenizer(folder: Path, family: Family) -> bytes:
    """The ``tokenizer.json`` of a checkpoint that has a byte-level BPE's files instead (:func:`is_built`).

    It normalizes to NFC, cuts texts up by the family's expression, adds no special token to a text, and has the added
    tokens under the ids that the file gives them. Raises :class:`D3tomError` where a file is none or they disagree.
    """
    return _built(folder, family)[0]


def _built(folder: Path, family: Family) -> tuple[bytes, Tokenizer]:
    vocabulary = _vocabulary(folder)
    added = _added_tokens(folder)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": family.byte_level_bpe},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _byte_level(use_regex=False),
            ],
        },
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": _merges(folder, vocabulary),
        },
    }
    document = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    what = f"What {folder} has for a tokenizer ({VOCABULARY_FILE}, {MERGES_FILE}, {ADDED_TOKENS_FILE})"
    tokenizer = checked_tokenizer(document, what)
    for token in added:
        found = tokenizer.token_to_id(token["content"])
        if found != token["id"]:
            raise _refused(
                folder / ADDED_TOKENS_FILE,
                f"its added token {shown(token['content'])} has id {token['id']:,}, and {found} is what "
                f"follows the {len(vocabulary):,} tokens of {VOCABULARY_FILE} and the added tokens before it",
            )
    return document, tokenizer


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _refused(path: Path, reason: str) -> D3tomError:
    return D3tomError(
        f"{path} is no part of a tokenizer that can be built: {printable(reason, 300)}. Fetch the file again, or put "
        f"the model's {TOKENIZER_FILE} beside it."
    )


def _vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and their ids, which are 0 and so on without a gap."""
    vocabulary = read_json(find_inside(folder, VOCABULARY_FILE), _MOST_BYTES)
    ids = list(vocabulary.values())
    if any(type(token) is not int for token in ids) or sorted(ids) != list(range(len(ids))):
        raise _refused(folder / VOCABULARY_FILE, f"the ids of its {len(ids):,} tokens are not 0 to {len(ids) - 1:,}")
    return vocabulary


def _merges(folder: Path, vocabulary: dict[str, int]) -> list[str]:
    """Pairs of tokens, the first to be merged first, each as its two tokens around a blank."""
    path = folder / MERGES_FILE
    try:
        lines = read_bytes(find_inside(folder, MERGES_FILE), _MOST_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise _refused(path, f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
    merges = []
    for number, line in enumerate(lines, 1):
        pair = line.split()
        if not pair or (number == 1 and line.startswith("#version:")):
            continue
        if len(pair) != 2 or any(part not in vocabulary for part in (*pair, "".join(pair))):
            raise _refused(path, f"line {number}, {shown(line)}, is no pair of tokens that make another")
        merges.append(" ".join(pair))
    return merges


def _added_tokens(folder: Path) -> list[dict[str, Any]]:
    """Added tokens by ascending id, as tokenizer.json has them."""
    path = folder / ADDED_TOKENS_FILE
    listed = read_json(find_inside(folder, ADDED_TOKENS_FILE)).get("added_tokens_decoder")
    if not isinstance(listed, dict) or not 0 < len(listed) <= _MOST_ADDED:
        found = f"{len(listed):,} tokens" if isinstance(listed, dict) else shown(listed)
        raise _refused(path, f"its added_tokens_decoder is {found}, expected an object of 1 to {_MOST_ADDED:,} tokens")
    tokens = []
    for key, token in listed.items():
        whole = isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"]
        if not whole or any(type(token.get(flag, False)) is not bool for flag in _FLAGS) or not _is_id(key):
            raise _refused(
                path, f"its added_tokens_decoder has {shown({key: token})}, expected an id, content and flags"
            )
        special = token.get("special", False)
        flags = {flag: token.get(flag, flag == "normalized" and not special) for flag in _FLAGS}
        tokens.append({"id": int(key), "content": token["content"], **flags})
    return sorted(tokens, key=lambda token: token["id"])


def _is_id(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) <= 10
