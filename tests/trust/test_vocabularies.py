"""tokenizer.json of strangers: used as transformers does, or refused in one paragraph and in silence."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from d3tom_export.bundled import bundled_model
from d3tom_export.config import TOKENIZER_FILE
from d3tom_export.errors import D3tomError
from d3tom_export.families.lavida_llada import FAMILY
from d3tom_export.prompt import chat as prompts
from d3tom_export.prompt.chat import IMAGE_TOKEN_INDEX, answer_text, load_tokenizer
from d3tom_export.prompt.conversation import conversation, joined
from d3tom_export.trust.vocabularies import guarded

RAW: dict[str, Any] = json.loads((bundled_model() / TOKENIZER_FILE).read_text(encoding="utf-8"))
BOS = RAW["added_tokens"][0]["id"]
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 200}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "x",
}  # fmt: skip
BEGINNING = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|startoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|startoftext|>": {"id": "<|startoftext|>", "ids": [BOS], "tokens": ["<|startoftext|>"]}},
}
BACKTRACKING = {"type": "Split", "pattern": {"Regex": r"(\w+\s?)+$\d"}, "behavior": "Isolated", "invert": False}


def chat(question: str) -> str:
    """The question in LaViDa's template."""
    return joined(FAMILY.template, conversation(question, FAMILY.system))


tokenize = partial(prompts.tokenize, bos=FAMILY.bos)


def _replace(what: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": what}, "content": by}


def _written(folder: Path, **changes: Any) -> Path:
    path = folder / TOKENIZER_FILE
    path.write_text(json.dumps(RAW | changes), encoding="utf-8")
    return path


def _release_ids(path: Path, prompt: str) -> list[int]:
    """The release's own way (lavida.md C3), on transformers' tokenizer."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<|startoftext|>")
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    ids, offset = [], 0
    if chunks[0] and chunks[0][0] == tokenizer.bos_token_id:
        offset, ids = 1, [chunks[0][0]]
    for number, chunk in enumerate(chunks):
        ids += [IMAGE_TOKEN_INDEX] * (number > 0) + chunk[offset:]
    return ids


@pytest.mark.parametrize(
    "changes",
    [{}, {"truncation": TRUNCATION}, {"padding": PADDING}, {"post_processor": BEGINNING},
     {"truncation": TRUNCATION, "padding": PADDING, "post_processor": BEGINNING},
     {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, _replace("ﬁ", "fi")]}}],
)  # fmt: skip
@pytest.mark.parametrize(
    "prompt",
    ["How many digits are in the picture?", chat("<image>\nWhat is in it?"), chat("<image>\n<image>\ntwo"), "a<image>b",
     chat("no picture, but <|eot_id|> spelled out"), "ﬁnd"],
)  # fmt: skip
def test_ids_are_the_releases(tmp_path: Path, changes: dict[str, Any], prompt: str) -> None:
    path = _written(tmp_path, **changes)
    assert tokenize(load_tokenizer(path), prompt) == _release_ids(path, prompt)


def test_a_beginning_of_every_chunk_is_what_the_release_drops(tmp_path: Path) -> None:
    plain, beginning = load_tokenizer(_written(tmp_path)), load_tokenizer(_written(tmp_path, post_processor=BEGINNING))
    text = chat("<image>\nWhat?")
    newline_kept = tokenize(plain, text, drop_token_after_image=False)
    assert tokenize(beginning, text) == [BOS, *newline_kept]
    assert tokenize(beginning, text, drop_token_after_image=False) == [BOS, *newline_kept]
    assert len(tokenize(plain, text)) == len(newline_kept) - 1


def _long_charsmap() -> str:
    return base64.b64encode((4).to_bytes(4, "little") + b"\0" * 4 + b"a" * 500 + b"\0").decode()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"truncation": TRUNCATION | {"stride": 9}}, "truncation has stride 9"),
        ({"padding": PADDING | {"strategy": {"Fixed": 10**9}}}, "pads to 1,000,000,000 tokens"),
        ({"padding": PADDING | {"pad_to_multiple_of": 10**9}}, "pads to 1,000,000,000 tokens"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}}, "library failed with"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": _long_charsmap()}}, "500 times longer"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "ab"}}, "library failed with"),
        ({"normalizer": {"type": "Sequence", "normalizers": [_replace("a", "a" * 10)] * 6}}, "1,000,000 times longer"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}, "1,000,001 times longer"),
        ({"decoder": _replace("a", "b" * 100)}, "decoder makes a text up to 100 times longer"),
        ({"post_processor": BEGINNING | {"single": BEGINNING["single"] * 1000}}, "puts 2,000 tokens around"),
        ({"post_processor": BEGINNING | {"special_tokens": []}}, "not of the kinds"),
        ({"normalizer": {"type": "Replace", "pattern": 5, "content": 7}}, "not of the kinds"),
        ({"added_tokens": [5]}, "not of the kinds"),
        ({"added_tokens": [RAW["added_tokens"][0] | {"content": "y" * 10**5}]}, "has 100,000 characters"),
        (
            {"added_tokens": [RAW["added_tokens"][0] | {"content": f"{i:04000}"} for i in range(300)]},
            "added tokens have 1,200,000 bytes",
        ),
        (
            {"model": {"type": "Unigram", "unk_id": 0, "vocab": [[f"{i:04000}", -1.0] for i in range(1100)]}},
            "tokens of its model have 4,400,000 bytes",
        ),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "not a tokenizer that can be used"),
        ({"model": 5}, "not a tokenizer that can be used"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_silence(
    tmp_path: Path, changes: dict[str, Any], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(D3tomError, match=says) as caught:
        load_tokenizer(_written(tmp_path, **changes))
    assert TOKENIZER_FILE in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_panic_over_a_prompt_or_an_answer_is_a_paragraph(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(_written(tmp_path, pre_tokenizer=BACKTRACKING))
    with pytest.raises(D3tomError, match=r"tokenizer cannot read this prompt: .*retry-limit"):
        tokenize(tokenizer, "How many digits are in the picture that is shown here?")
    with pytest.raises(D3tomError, match="tokenizer cannot write this answer"):
        answer_text(load_tokenizer(_written(tmp_path)), [2**40], [])
    assert capfd.readouterr().err == ""


def test_what_others_print_meanwhile_comes_out_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: os.write(2, b"from a thread\n")) == 14
    assert capfd.readouterr().err == "from a thread\n"
    with pytest.raises(ValueError, match="bad"):
        guarded(lambda: [][0] if os.write(2, b"kept\n") < 0 else int("bad"))
    assert capfd.readouterr().err == "kept\n"
    with pytest.raises(KeyboardInterrupt):
        guarded(_interrupted)


def _interrupted() -> None:
    raise KeyboardInterrupt


def test_other_files_than_regular_ones_are_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / TOKENIZER_FILE
    os.mkfifo(path)
    with pytest.raises(D3tomError, match="named pipe"):
        load_tokenizer(path)
    path.unlink()
    path.symlink_to(bundled_model() / TOKENIZER_FILE)
    with pytest.raises(D3tomError, match="leads out of its folder"):
        load_tokenizer(path)


def test_a_path_of_any_characters_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "模型 é"
    folder.mkdir()
    words = RAW["model"]["vocab"].keys() | {token["content"] for token in RAW["added_tokens"]}
    assert load_tokenizer(_written(folder)).get_vocab_size() == len(words)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 2**40), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)
PARTS = st.one_of(
    JSON,
    st.sampled_from([TRUNCATION, PADDING, BEGINNING, BACKTRACKING, _replace("a", "bc"), {"type": "ByteLevel"}]),
    st.builds(lambda kind, rest: rest | {"type": kind}, st.sampled_from(
        ["Replace", "Prepend", "Precompiled", "Sequence", "TemplateProcessing", "Split", "Metaspace", "Strip", "BPE",
         "Unigram", "WordPiece", "WordLevel", "BertNormalizer", "RobertaProcessing", "CTC", "Fuse"]
    ), st.dictionaries(st.sampled_from(
        ["content", "prepend", "pattern", "normalizers", "single", "special_tokens", "vocab", "merges", "unk_id",
         "behavior", "invert", "replacement", "prepend_scheme", "sep", "cls", "start", "stop"]), JSON, max_size=5)),
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(st.sampled_from([*RAW, "decoder"]), PARTS, min_size=1, max_size=3))
def test_a_changed_tokenizer_works_or_is_refused(tmp_path_factory: pytest.TempPathFactory, changes: dict) -> None:
    path = _written(tmp_path_factory.mktemp("fuzz"), **copy.deepcopy(changes))
    with contextlib.suppress(D3tomError):
        ids = tokenize(load_tokenizer(path), chat("<image>\nWhat is it?"))
        assert isinstance(answer_text(load_tokenizer(path), [abs(token) for token in ids], []), str)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(where=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), keep=st.sampled_from([1.0, 0.999, 0.5]))
def test_a_damaged_tokenizer_works_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, where: float, byte: int, keep: float
) -> None:
    content = bytearray((bundled_model() / TOKENIZER_FILE).read_bytes())
    content[int(where * len(content))] = byte
    path = tmp_path_factory.mktemp("fuzz") / TOKENIZER_FILE
    path.write_bytes(content[: int(len(content) * keep)])
    with contextlib.suppress(D3tomError):
        assert min(tokenize(load_tokenizer(path), chat("What is it?")), default=0) >= 0


@pytest.mark.parametrize("prefix", ["x", "##", "éé"])
@pytest.mark.parametrize("merge", [["a", "é"], "a é"], ids=["pair", "text"])
def test_a_merge_without_the_prefix_that_is_cut_off_it_is_refused(prefix: str, merge: Any, tmp_path: Path) -> None:
    # Loaded, it ends the process: the library cuts inside a character and panics twice.
    model = {"type": "BPE", "vocab": {"a": 0, "é": 1, "aé": 2}, "merges": [merge], "continuing_subword_prefix": prefix}
    path = _written(tmp_path, model=model, added_tokens=[])
    with pytest.raises(D3tomError, match="continuing_subword_prefix"):
        load_tokenizer(path)


@pytest.mark.parametrize("kind", ["ByteLevel", "Metaspace"])
@pytest.mark.parametrize(("part", "members"), [("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")])
def test_steps_that_each_make_a_text_longer_are_counted_in_every_part(
    kind: str, part: str, members: str, tmp_path: Path
) -> None:
    steps = [{"type": kind, "add_prefix_space": True, "trim_offsets": True, "use_regex": True}] * 30
    path = _written(tmp_path, **{part: {"type": "Sequence", members: steps}})
    with pytest.raises(D3tomError, match=f"its {part} makes a text up to"):
        load_tokenizer(path)


@pytest.mark.parametrize("merge", [["a"], 3, None, {"a": "b"}], ids=str)
def test_merges_of_other_kinds_are_refused(merge: Any, tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": [merge], "continuing_subword_prefix": "#"}
    with pytest.raises(D3tomError, match="tokenizer"):
        load_tokenizer(_written(tmp_path, model=model, added_tokens=[]))
