"""Headers of strangers: looked at before they are read, judged by the safetensors library, no foreign exception."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from d3tom_export.errors import D3tomError
from d3tom_export.trust.tensors import check_unchanged, open_stored, read_header

VALID: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "empty": {"dtype": "BF16", "shape": [0], "data_offsets": [24, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def _write(path: Path, header: dict[str, Any] | bytes, data: bytes = bytes(range(32))) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _changed(name: str, **changes: Any) -> dict[str, Any]:
    return {**VALID, name: {**VALID[name], **changes}}


def test_offsets_are_those_of_the_data(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.safetensors", VALID)
    tensors = read_header(path)
    assert list(tensors) == ["a", "empty", "b"]
    whole = path.read_bytes()
    for name, (begin, end) in (("a", (0, 24)), ("b", (24, 32)), ("empty", (0, 0))):
        tensor = tensors[name]
        assert whole[tensor.offset : tensor.offset + tensor.length] == bytes(range(begin, end))
        with open_stored(tensor) as file:
            assert os.fstat(file.fileno()).st_size == tensor.file_bytes == len(whole)
    assert read_header(_write(tmp_path / "none.safetensors", {}, b"")) == {}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (_changed("b", data_offsets=[0, 8]), bytes(32)),  # overlap
        (_changed("b", data_offsets=[28, 36]), bytes(36)),  # gap
        (VALID, bytes(40)),  # trailing bytes
        (_changed("a", shape=[2.0, 3.0]), bytes(32)),
        (_changed("a", data_offsets=[0.0, 24.0]), bytes(32)),
        (_changed("a", shape=[True, 6]), bytes(32)),
        (_changed("a", shape=[-2, -3]), bytes(32)),
        (_changed("a", shape=[2**40, 2**40]), bytes(32)),  # the product overflows
        (_changed("a", shape=[2**63, 2]), bytes(32)),
        (_changed("a", dtype="F33"), bytes(32)),
        (_changed("a", dtype=["F32"]), bytes(32)),
        ({**VALID, "x": {"dtype": "WEIRD", "shape": [3], "data_offsets": [-100, 5]}}, bytes(32)),
        ({**VALID, "__metadata__": {"a": 1}}, bytes(32)),
        ({**VALID, "a": ["F32", [2, 3], [0, 24]]}, bytes(32)),
        (json.dumps(VALID).encode("utf-16"), bytes(32)),
        (json.dumps(VALID)[:-1].encode() + b', "a": ' + json.dumps(VALID["a"]).encode() + b"}", bytes(32)),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, bytes(32)),
        (b"[" * 100_000, b""),
        (b"{}", b"\0"),
        (b"", b""),
    ],
)
def test_headers_that_make_no_sense(tmp_path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    path = _write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(D3tomError, match=r"a\.safetensors (has a safetensors header|is truncated)") as caught:
        read_header(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [5 * 2**30, 100_000_001, 17 << 20])
def test_a_header_is_not_read_before_its_length_was_looked_at(tmp_path: Path, length: int) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(length + 8)
    with pytest.raises(D3tomError, match=f"has a header of {length:,} bytes, at most 16,777,216 are read") as caught:
        read_header(path)
    assert ("safetensors itself reads 100,000,000" in str(caught.value)) == (length > 100_000_000)


def test_other_kinds_of_files_and_short_ones(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, says in (("pipe", "a named pipe"), (".", "a folder"), ("none", "does not exist")):
        with pytest.raises(D3tomError, match=says):
            read_header(tmp_path / name)
    for content in (b"", b"\0" * 7, struct.pack("<Q", 2**64 - 1), struct.pack("<Q", 3) + b"{}"):
        (tmp_path / "short").write_bytes(content)
        with pytest.raises(D3tomError, match="truncated or not a safetensors file"):
            read_header(tmp_path / "short")


def test_a_file_that_changed_since_is_not_read(tmp_path: Path) -> None:
    tensors = read_header(_write(tmp_path / "a.safetensors", VALID))
    check_unchanged(tensors.values())
    with (tmp_path / "a.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(D3tomError, match="was changed while it was in use"):
        check_unchanged(tensors.values())
    (tmp_path / "a.safetensors").unlink()
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(D3tomError, match="a named pipe"):
        open_stored(tensors["b"])


_numbers = st.one_of(st.integers(-(2**70), 2**70), st.integers(0, 40), st.floats(), st.booleans(), st.none())
_values = st.recursive(
    st.one_of(_numbers, st.text(max_size=6), st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "BOOL"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def _headers(draw: st.DrawFn) -> bytes:
    header = json.loads(json.dumps(VALID))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([*header, "new"]))
        if name in ("__metadata__", "new") or draw(st.booleans()):
            header[name] = draw(_values)
        elif isinstance(header[name], dict):
            header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(_values)
    text = json.dumps(header).encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=3)) + text[at + draw(st.integers(0, 3)) :]
    return text


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=_headers(), data=st.sampled_from([bytes(32), bytes(31), bytes(40), b""]), claimed=st.integers(-2, 2))
@example(header=json.dumps(VALID).encode(), data=bytes(32), claimed=0)
def test_what_is_taken_the_library_takes_too(tmp_path: Path, header: bytes, data: bytes, claimed: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(header) + claimed)) + header + data)
    try:
        tensors = read_header(path)
    except D3tomError:
        return
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert tuple(file.get_slice(name).get_shape()) == tensor.shape
    assert all(
        0 <= tensor.offset <= tensor.offset + tensor.length <= path.stat().st_size for tensor in tensors.values()
    )
