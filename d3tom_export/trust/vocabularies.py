"""A ``tokenizer.json`` of strangers: looked through before it is loaded, every call of the library guarded.

The library is written in Rust. What it did not foresee is a panic: an exception past every ``except Exception``, with
a trace that Rust itself writes to standard error. Here both end: a panic becomes a :class:`D3tomError`, and what was
written meanwhile is dropped. Memory that runs out ends the process instead, so what makes text longer is counted in
the file first: prepended and replaced text, what a post-processor adds, padding. A panic that meets another ends it
too: merges on which the library has been seen to do that are refused.
"""

from __future__ import annotations

import base64
import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from tokenizers import Tokenizer

from d3tom_export.errors import D3tomError, printable
from d3tom_export.trust.documents import parse_json
from d3tom_export.trust.files import read_bytes

T = TypeVar("T")

_MOST_BYTES = 40 << 20
"""Of a tokenizer.json. One of 256,000 tokens takes 34 MB."""

_MOST_TRIE_TEXT = 4 << 20
"""Bytes of all tokens of a Unigram model, which holds 0.3 kB of memory for each; 250,000 real ones have 2.5 MB."""

_MOST_ADDED_TEXT = 1 << 20
"""Bytes of all added tokens: an automaton that finds them takes 10 s for 1 MiB."""

_MOST_GROWTH = 64
"""How many times longer normalizer or decoder may make a text. Unicode's own forms make it up to 18 times longer."""

_MOST_ADDED = 64
"""Tokens that a post-processor may put around a text. Real ones put one or two."""

_LONGEST_PADDING = 1 << 20
"""Tokens. Padding is switched off, but a file that asks for more was not made for any model."""

_LONGEST_TOKEN = 4096
"""Characters of one token: an answer is as long as its tokens, whatever their number."""

_ONE_AT_A_TIME = threading.Lock()
"""File descriptor 2 is the whole process's."""

_PROBE = "What is in the picture?\n\nÄ 漢字 12345 <|startoftext|> !?"
"""Encoded and decoded once after loading: most defects show only then."""


def read_tokenizer(path: Path) -> Tokenizer:
    """Load a ``tokenizer.json`` as transformers does: stored truncation and padding switched off.

    Its bytes are read by us, so the path may hold any characters. Raises :class:`D3tomError` where the file is not a
    regular one, too large, no tokenizer, or one that fails on a plain sentence.
    """
    return checked_tokenizer(read_bytes(path, _MOST_BYTES), str(path))


def checked_tokenizer(content: bytes, name: str) -> Tokenizer:
    """Load the tokenizer.json that ``content`` is, as :func:`read_tokenizer` does; messages call it ``name``."""
    try:
        raw = parse_json(content)
        try:
            _check(raw)
        except (AttributeError, IndexError, KeyError, TypeError):
            raise ValueError("its parts are not of the kinds that a tokenizer.json has") from None
        tokenizer: Tokenizer = guarded(lambda: Tokenizer.from_buffer(content))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        guarded(lambda: tokenizer.decode(tokenizer.encode(_PROBE).ids))
    except ValueError as error:
        reason = printable(str(error), 300)
        raise D3tomError(f"{name} is not a tokenizer that can be used: {reason}. Fetch the file again.") from None
    return tokenizer


def guarded(call: Callable[[], T]) -> T:
    """What ``call`` gives. Whatever the tokenizer library raises, panics too, becomes a ``ValueError`` with its words.

    What is written to standard error meanwhile, by any thread, comes out after the call, or not at all where it
    panicked. One call at a time.
    """
    panicked = False
    with _ONE_AT_A_TIME, _open_sink() as sink:
        restore = _redirect_standard_error(sink.fileno())
        try:
            return call()
        except Exception as error:  # the library raises bare Exception for every defect
            raise ValueError(str(error) or type(error).__name__) from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            panicked = True
            raise ValueError(f"the tokenizer library failed with {error}") from None
        finally:
            restore()
            if not panicked:
                _replay(sink)


def _open_sink() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("standard error"), "w+b")
    return tempfile.TemporaryFile()


def _redirect_standard_error(target: int) -> Callable[[], None]:
    """Lead file descriptor 2 elsewhere; the function given leads it back."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed: nothing to lead elsewhere
        return lambda: None
    os.dup2(target, 2)

    def restore() -> None:
        os.dup2(kept, 2)
        os.close(kept)

    return restore


def _replay(sink: IO[bytes]) -> None:
    sink.seek(0)
    if content := sink.read(1 << 16):
        with contextlib.suppress(OSError):
            os.write(2, content)


def _check(raw: dict[str, Any]) -> None:
    """Refuse what would take endless memory to use: ``ValueError`` says what; other kinds of errors, that it is odd."""
    truncation, padding = raw.get("truncation"), raw.get("padding")
    if isinstance(truncation, dict) and _number(truncation, "stride") >= max(_number(truncation, "max_length"), 1):
        raise ValueError(
            f"its truncation has stride {truncation['stride']}, which max_length {truncation.get('max_length')} does "
            "not exceed"
        )
    if isinstance(padding, dict):
        strategy = padding.get("strategy")
        lengths = [_number(padding, "pad_to_multiple_of")]
        lengths += [_number(strategy, "Fixed")] if isinstance(strategy, dict) else []
        if max(lengths) > _LONGEST_PADDING:
            raise ValueError(f"it pads to {max(lengths):,} tokens")
    for part, members in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")):
        growth = 1.0
        for step in _steps(raw.get(part), members):
            growth *= max(1.0, _growth(step))
        if growth > _MOST_GROWTH:
            raise ValueError(
                f"its {part} makes a text up to {growth:,.0f} times longer, at most {_MOST_GROWTH} is usual"
            )
    _check_tokens(raw)
    added = sum(_added_tokens(step) for step in _steps(raw.get("post_processor"), "processors"))
    if added > _MOST_ADDED:
        raise ValueError(f"its post_processor puts {added:,} tokens around a text, at most {_MOST_ADDED} is usual")


def _number(raw: dict[str, Any], name: str) -> int:
    value = raw.get(name)
    return value if isinstance(value, int) else 0


def _steps(part: Any, members: str) -> Iterator[dict[str, Any]]:
    """A part's steps, those of sequences one after the other."""
    if not isinstance(part, dict):
        return
    inner = part.get(members)
    if part.get("type") == "Sequence" and isinstance(inner, list):
        for step in inner:
            yield from _steps(step, members)
    else:
        yield part


def _growth(step: dict[str, Any]) -> float:
    """How many times longer a step may make a text; characters per character that it takes."""
    kind, content = step.get("type"), step.get("content") or step.get("prepend") or ""
    if not isinstance(content, str):
        raise TypeError
    if kind == "Replace":
        pattern = step.get("pattern")
        taken = len(pattern.get("String") or "") if isinstance(pattern, dict) else 0  # a Regex may take nothing
        return max(len(content), 1) / max(taken, 1)
    if kind == "Precompiled":
        return _longest_replacement(step.get("precompiled_charsmap"))
    if kind == "ByteLevel":
        return 4.0  # a character becomes as many as it has bytes in UTF-8
    # Texts come in pieces as short as a character, each of which may get what is put before it.
    if kind == "Metaspace":
        return 2.0
    return 1.0 + len(content) if kind == "Prepend" else 1.0


def _longest_replacement(charsmap: Any) -> float:
    """Characters of the longest text that a precompiled map of SentencePiece puts in place of another.

    The map, in base64: the size of a trie in 4 bytes, the trie, and the texts, each closed by a zero byte.
    """
    try:
        content = base64.b64decode(charsmap, validate=True)
    except (ValueError, TypeError):
        return 1.0  # the library will say so
    texts = content[4 + int.from_bytes(content[:4], "little") :]
    return float(max(len(text.decode("utf-8", "replace")) for text in texts.split(b"\0")))


def _check_tokens(raw: dict[str, Any]) -> None:
    """Limits on the tokens' texts; kinds of models list them in different ways."""
    model = raw.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    pieces = vocabulary if isinstance(vocabulary, (dict, list)) else []
    texts = [piece[0] if isinstance(piece, list) and piece else piece for piece in pieces]
    added = [token.get("content", "") for token in raw.get("added_tokens") or []]
    if isinstance(model, dict):
        _check_merges(model)
    longest = max(map(len, [*texts, *added]), default=0)
    if longest > _LONGEST_TOKEN:
        raise ValueError(f"one of its tokens has {longest:,} characters, at most {_LONGEST_TOKEN:,} are usual")
    for what, all_texts, limit in (
        ("tokens of its model", texts if isinstance(vocabulary, list) else [], _MOST_TRIE_TEXT),
        ("added tokens", added, _MOST_ADDED_TEXT),
    ):
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in all_texts)
        if size > limit:
            raise ValueError(f"the {what} have {size:,} bytes of text, at most {limit:,} are usual")


def _check_merges(model: dict[str, Any]) -> None:
    """Refuse merges whose second half lacks the prefix that the library cuts off it: inside a character it aborts."""
    prefix = model.get("continuing_subword_prefix")
    if not isinstance(prefix, str) or not prefix:
        return
    for merge in model.get("merges") or []:
        second = merge.partition(" ")[2] if isinstance(merge, str) else merge[1]
        if not second.startswith(prefix):
            raise ValueError(f"its merge {merge!r} does not go on with its continuing_subword_prefix {prefix!r}")


def _added_tokens(step: dict[str, Any]) -> int:
    """Ids that a post-processor's step puts around one text."""
    if step.get("type") != "TemplateProcessing":
        return 2  # Bert's and Roberta's
    single, pair, special = step.get("single"), step.get("pair"), step.get("special_tokens")
    if not isinstance(single, list) or not isinstance(pair or [], list) or not isinstance(special, dict):
        raise TypeError
    ids = {name: len(entry["ids"]) for name, entry in special.items() if isinstance(entry.get("ids"), list)}
    named = [piece["SpecialToken"]["id"] for piece in single if "SpecialToken" in piece]
    return sum(ids.get(name, 1) for name in named) + sum("Sequence" in piece for piece in single)
