"""JSON of strangers: whatever stands in the file, an object or one paragraph."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.errors import D3tomError
from d3tom_export.trust.documents import parse_json, read_json


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[]", "a JSON list"),
        ("null", "a JSON NoneType"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "not finite"),
        ('{"a": ' + "9" * 5000 + "}", "does not fit into 64 bits"),
        ('{"a": 18446744073709551616}', "does not fit into 64 bits"),
        ('{"a": -9223372036854775809}', "does not fit into 64 bits"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "levels deep"),
        ('{"a":' * 40 + "1" + "}" * 40, "more than 32 levels deep"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "more than 32 levels deep"),
    ],
)
def test_what_is_no_document(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(D3tomError, match="cannot be read as JSON") as caught:
        read_json(tmp_path / "config.json")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_other_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(ValueError, match=r"not UTF-8|Expecting"):
        parse_json('{"ä": 1}'.encode(encoding))


def test_too_long_a_document_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(D3tomError, match="at most 16,777,216 are expected"):
        read_json(tmp_path / "config.json")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=8), _VALUES, max_size=5))
def test_documents_are_read_as_they_are(value: dict[str, object]) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@given(st.binary(max_size=200))
def test_bytes_give_an_object_or_a_value_error(content: bytes) -> None:
    with suppress(ValueError):
        assert isinstance(parse_json(content), dict)
