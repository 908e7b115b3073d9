"""Tokenizers built from a slow one's files: those of the fast one, or refused in one paragraph."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from d3tom_export.errors import D3tomError
from d3tom_export.families import lavida_dream, llada
from d3tom_export.prompt.vocabulary import (
    ADDED_TOKENS_FILE,
    MERGES_FILE,
    VOCABULARY_FILE,
    built_tokenizer,
    has_tokenizer,
    open_tokenizer,
    vocabulary_size,
)
from d3tom_export.trust.vocabularies import checked_tokenizer

FAMILY = lavida_dream.FAMILY
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")


def _trained() -> Tokenizer:
    """A tokenizer as Dream's converted one is, of a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(FAMILY.byte_level_bpe), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["What is in the picture? It's 2024, they'll see.\n\n", "naïve café Straße 漢字 emoji 🦊  \t x"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


TRAINED = _trained()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slow(tmp_path_factory.mktemp("slow"))


def write_slow(folder: Path, **said: Any) -> Path:
    """The files of a slow tokenizer, and what else its config says."""
    TRAINED.model.save(str(folder))
    size = TRAINED.get_vocab_size()
    added = {str(size + place): _added(token) for place, token in enumerate(ADDED)}
    (folder / ADDED_TOKENS_FILE).write_text(json.dumps({"added_tokens_decoder": added, **said}))
    return folder


def _added(token: str) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": token, **flags, "special": True}


WHOLE = Tokenizer.from_str(TRAINED.to_str())
WHOLE.add_special_tokens([AddedToken(token, normalized=False) for token in ADDED])


def test_it_is_counted_with_its_added_tokens(folder: Path) -> None:
    assert has_tokenizer(folder, FAMILY)
    assert not has_tokenizer(folder, llada.FAMILY)
    assert vocabulary_size(folder, FAMILY) == TRAINED.get_vocab_size() + len(ADDED)
    with pytest.raises(D3tomError, match=r"tokenizer\.json does not exist"):
        open_tokenizer(folder, llada.FAMILY)


BUILT: dict[Path, Tokenizer] = {}


@given(st.lists(st.text(max_size=9) | st.sampled_from([*ADDED, "it's", "  \n\n ", "12345", "e\u0301"]), max_size=5))
def test_it_reads_and_writes_as_the_fast_one_does(folder: Path, pieces: list[str]) -> None:
    text = "".join(pieces).encode("utf-8", "replace").decode()
    if folder not in BUILT:
        BUILT[folder] = checked_tokenizer(built_tokenizer(folder, FAMILY), "built")
    built = BUILT[folder]
    ids = built.encode(text).ids
    assert ids == WHOLE.encode(text).ids
    assert built.decode(ids, skip_special_tokens=False) == WHOLE.decode(ids, skip_special_tokens=False)


def test_a_tokenizer_json_goes_before_it(folder: Path, tmp_path: Path) -> None:
    write_slow(tmp_path)
    other = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    other.save(str(tmp_path / "tokenizer.json"))
    assert vocabulary_size(tmp_path, FAMILY) == 1


def _vocabulary(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        raw = json.loads((folder / VOCABULARY_FILE).read_text())
        change(raw)
        (folder / VOCABULARY_FILE).write_text(json.dumps(raw))

    return damage


def _tokens(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        raw = json.loads((folder / ADDED_TOKENS_FILE).read_text())
        change(raw["added_tokens_decoder"])
        (folder / ADDED_TOKENS_FILE).write_text(json.dumps(raw))

    return damage


def _too_long(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate((16 << 20) + 1)

    return damage


FIRST = str(TRAINED.get_vocab_size())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_vocabulary(lambda raw: raw.update({"new": 10**6})), "are not 0 to"),
        (_vocabulary(lambda raw: raw.update({"new": "7"})), "are not 0 to"),
        (_vocabulary(lambda raw: raw.update({"new": True})), "are not 0 to"),
        (_vocabulary(lambda raw: raw.update({"n" * 5000: len(raw)})), "has 5,000 characters"),
        (_vocabulary(lambda raw: raw.update({"new": len(raw)})), "has id"),  # the added ones no longer follow
        (lambda folder: (folder / VOCABULARY_FILE).write_text("[]"), "expected an object"),
        (lambda folder: (folder / MERGES_FILE).write_text("#version: 0.2\na b c\n"), "line 2, 'a b c', is no pair"),
        (lambda folder: (folder / MERGES_FILE).write_text("zz qq\n"), "line 1, 'zz qq', is no pair"),
        (lambda folder: (folder / MERGES_FILE).write_bytes(b"\xff"), "is not UTF-8"),
        (lambda folder: (folder / MERGES_FILE).unlink(), "merges.txt does not exist"),
        (lambda folder: (folder / ADDED_TOKENS_FILE).write_text("{}"), "added_tokens_decoder is None"),
        (lambda folder: (folder / ADDED_TOKENS_FILE).unlink(), "does not exist"),
        (_tokens(lambda raw: raw.update({"x": _added("y")})), "expected an id, content and flags"),
        (_tokens(lambda raw: raw.update({FIRST: {"content": 7}})), "expected an id, content and flags"),
        (_tokens(lambda raw: raw[FIRST].update(special=1)), "expected an id, content and flags"),
        (_tokens(lambda raw: raw.update({"9999": _added("y")})), "added token 'y' has id 9,999, and"),
        (_tokens(lambda raw: raw.update({str(n): _added("y") for n in range(5000)})), "is 5,0"),
        (_too_long(VOCABULARY_FILE), "at most 16,777,216"),
        (_too_long(MERGES_FILE), "at most 16,777,216"),
    ],
)
def test_files_that_make_no_tokenizer_are_refused(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(write_slow(tmp_path))
    with pytest.raises(D3tomError, match=says) as caught:
        open_tokenizer(tmp_path, FAMILY)
    assert "\n" not in str(caught.value)


def test_an_expression_is_the_familys(folder: Path) -> None:
    words = replace(FAMILY, byte_level_bpe=r"\s+|\S+")
    document = json.loads(built_tokenizer(folder, words))
    assert document["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": r"\s+|\S+"}
