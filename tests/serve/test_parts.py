"""The parts of a server by themselves: lengths, stop texts, what of an answer is final, keys, limits."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from d3tom_export.config import GenerationConfig
from d3tom_export.errors import CallError, D3tomError
from d3tom_export.prompt.chat import answer_text
from d3tom_export.prompt.pieces import begun, final_text
from d3tom_export.serve.keys import VARIABLE, Keys, read_keys
from d3tom_export.serve.lengths import length_settings
from d3tom_export.serve.limits import Limits
from d3tom_export.serve.stops import StopTexts
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
MASK = 258


@pytest.mark.parametrize(
    ("base", "most", "expected"),
    [
        ({}, 5, {"gen_length": 5}),
        ({}, 100, {"gen_length": 100}),
        ({"block_length": 4}, 11, {"gen_length": 8}),
        ({"block_length": 4}, 3, {"gen_length": 3}),
        ({"steps": 8}, 32, {"gen_length": 32, "steps": 16}),
        ({"steps": 8}, 1, {"gen_length": 1, "steps": 1}),
        ({"steps": 8, "block_length": 4}, 9, {"gen_length": 8, "steps": 4}),
        ({"steps": 8, "block_length": 4}, 3, {"gen_length": 3, "steps": 2}),
        ({"step_ratio": 0.5}, 6, {"gen_length": 6}),
        ({"step_ratio": 0.5}, 1, {"gen_length": 1, "steps": 1}),
        ({"step_ratio": 0.25, "block_length": 4}, 3, {"gen_length": 3, "steps": 1}),
        ({"commit": "threshold", "block_length": 4, "max_steps": 2}, 9, {"gen_length": 8}),
        (
            {"schedule": "vanilla", "steps": 16, "step_ratio": 0.5},
            8,
            {"gen_length": 8, "steps": 8, "step_ratio": 0.5},
        ),
    ],
)
def test_lengths(base: dict[str, Any], most: int, expected: dict[str, Any]) -> None:
    assert length_settings(GenerationConfig(gen_length=16, **base), most) == expected


@given(
    most=st.integers(1, 64),
    blocks=st.integers(1, 4),
    block=st.sampled_from([None, 1, 3, 8]),
    steps=st.sampled_from([None, 1, 2, 5]),
    ratio=st.sampled_from([None, 0.1, 0.5, 1.0]),
)
def test_every_length_can_be_had(most: int, blocks: int, block: int | None, steps: int | None, ratio: Any) -> None:
    """As near to what was asked for as blocks allow, and never longer."""
    length = 12 if block is None else block * blocks
    many = None if steps is None or ratio is not None else steps * (1 if block is None else blocks)
    try:
        base = GenerationConfig(gen_length=length, block_length=block, steps=many, step_ratio=ratio)
    except D3tomError:
        return  # no bundle has such
    found = base.changed(**length_settings(base, most))
    assert most - (found.block_length or 1) < found.gen_length <= most
    assert 1 <= found.total_steps <= found.gen_length


@pytest.mark.parametrize(
    ("stops", "text", "said", "cut"),
    [
        ([], "ab", "ab", "ab"),
        (["bc"], "ab", "a", "ab"),
        (["bc"], "abcd", "a", "a"),
        (["bc", "a"], "xabcd", "x", "x"),
        (["abb", "b"], "xabb", "xa", "xa"),
        (["aab"], "xaa", "x", "xaa"),
        (["aab"], "xaaa", "xa", "xaaa"),
        (["\n\n"], "one\n", "one", "one\n"),
    ],
)
def test_stop_texts(stops: list[str], text: str, said: str, cut: str) -> None:
    assert StopTexts(stops).said(text) == said
    assert StopTexts(stops).cut(text) == (cut, cut != text)


@given(st.text("ab", max_size=10), st.text("ab", min_size=1, max_size=8))
def test_what_of_a_stop_is_begun(known: str, stop: str) -> None:
    expected = max((n for n in range(1, len(stop)) if known.endswith(stop[:n])), default=0)
    assert begun(known, stop) == begun(list(known), list(stop)) == expected


def test_long_stops_take_no_longer_than_they_are() -> None:
    """The worst of them: repetitions, of which each beginning looks like the next."""
    known, stop = "a" * 50_000, "a" * 40_000 + "b" * 10_000
    started = time.process_time()
    assert begun(known, stop) == 40_000
    assert begun("b" + known, "ab" * 25_000) == 1
    assert time.process_time() - started < 2  # it was minutes


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_said_stays(text: str, stops: list[str]) -> None:
    texts = StopTexts(stops)
    whole, so_far = texts.cut(text)[0], ""
    for end in range(len(text) + 1):
        said = texts.said(text[:end])
        assert said.startswith(so_far)
        assert whole.startswith(said)
        so_far = said


@example(text="aa ", ends=0, order=random.Random(5), stop="a ")  # in the order of the text
@given(
    text=st.text(st.sampled_from("a b\n\u00e9\u20ac\U0001f600"), max_size=8),
    ends=st.integers(0, 3),
    order=st.randoms(use_true_random=False),
    stop=st.text("ab ", max_size=3),
)
def test_what_is_final_only_grows(text: str, ends: int, order: Any, stop: str) -> None:
    """In whatever order tokens are committed: bytes of a character among them, blanks, and beginnings of stops."""
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids + [257] * ends
    stops = [TOKENIZER.encode(stop, add_special_tokens=False).ids] if stop else []
    places = list(range(len(ids)))
    order.shuffle(places)
    so_far, known = "", [MASK] * len(ids)
    for place in [None, *places]:
        if place is not None:
            known[place] = ids[place]
        end = known.index(257) if 257 in known else len(known)
        stop_at = next((at for at in range(end) if stops and known[at : at + len(stops[0])] == stops[0]), end)
        said = final_text(known[:stop_at], TOKENIZER, MASK, stops)
        assert said.startswith(so_far)
        so_far = said
    end = next((at for at in range(len(ids)) if stops and ids[at : at + len(stops[0])] == stops[0]), len(ids))
    assert answer_text(TOKENIZER, ids[:end], {257}).startswith(so_far)


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_keys(None) == ()
    monkeypatch.setenv(VARIABLE, "the-environments-key")
    assert read_keys(None) == ("the-environments-key",)
    file = tmp_path / "keys"
    file.write_text("\nfirst-key-of-them\n  second-key-of-them \n")
    assert read_keys(file) == ("first-key-of-them", "second-key-of-them")
    bad = {
        "": "holds no key",
        "short": "16 or more",
        "a key with blanks in it": "no blank",
        "k\u00e9y" * 9: "printable",
    }
    for content, says in bad.items():
        file.write_text(content)
        with pytest.raises(D3tomError, match=says):
            read_keys(file)
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(D3tomError, match=f"The variable {VARIABLE}"):
        read_keys(None)
    with pytest.raises(D3tomError, match="does not exist"):
        read_keys(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(D3tomError, match="named pipe"):
        read_keys(tmp_path / "pipe")


def test_keys_compare_whole() -> None:
    assert Keys(()).let_in("")
    keys = Keys(["first-key-of-them", "second-key-of-them"])
    assert keys.let_in("bearer second-key-of-them")
    assert not keys.let_in("Bearer second-key-of-the")
    assert not keys.let_in("Bearer second-key-of-them, first-key-of-them")


@pytest.mark.parametrize(
    "keys", ["one-key-that-is-a-text", b"bytes-of-a-key-of-them", [b"bytes-of-a-key-of-them"], [""]]
)
def test_keys_that_would_let_anybody_in(keys: Any) -> None:
    """A text's characters are no keys, nor is an empty one, which `Bearer` alone would have."""
    with pytest.raises(D3tomError, match=r"Give every key|a key has 16"):
        Keys(keys)


@pytest.mark.parametrize("limits", [{"queue": -1}, {"seconds": 0}, {"body_bytes": 0}, {"batch": 0}, {"tokens": 0}])
def test_limits_that_let_nothing_through(limits: dict[str, int]) -> None:
    with pytest.raises(CallError, match="cannot be"):
        Limits(**limits)
