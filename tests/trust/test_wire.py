"""Messages of protocol buffers: whatever is not written as we write it is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.trust.wire import field_bytes, fields, integer, read_message, rewritten, varint_bytes

KNOWN = fields(numbers=(1, 2), spans=(3, 4), floats=(5,), many=(2, 4))


def test_fields_are_read_by_number() -> None:
    data = b"\x08\x96\x01" + b"\x10\x01\x10\x02" + field_bytes(3, b"abc") + field_bytes(4, b"") + b"\x2d\0\0\x80\x3f"
    found = read_message(data, (0, len(data)), KNOWN, "it")
    assert found[1] == 150
    assert found[2] == [1, 2]
    assert data[slice(*found[3])] == b"abc"
    assert len(found[4]) == 1
    assert data[slice(*found[5])] == b"\0\0\x80\x3f"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x08", "ends before"),
        (b"\x08\xff", "ends before"),
        (b"\x08" + b"\xff" * 11, "more than 64 bits"),
        (b"\x1a\x05ab", "ends before"),
        (b"\x1a" + varint_bytes(2**63) + b"ab", "ends before"),
        (b"\x2d\0\0", "ends before"),
        (b"\x08\x01\x08\x02", "field 1 twice"),
        (b"\x30\x01", "a field 6"),
        (b"\x0a\x01a", r"a field 1 \(form 2\)"),
        (b"\x0b\x0c", r"a field 1 \(form 3\)"),
        (b"\x09" + b"\0" * 8, r"a field 1 \(form 1\)"),
        (b"\x00", "a field 0"),
    ],
)
def test_what_is_not_written_so_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_message(data, (0, len(data)), KNOWN, "it")


@given(st.integers(-(2**63), 2**63 - 1))
def test_numbers_survive(number: int) -> None:
    data = b"\x08" + varint_bytes(number & 2**64 - 1)
    assert integer(read_message(data, (0, len(data)), KNOWN, "it")[1]) == number


@given(st.lists(st.binary(max_size=200), max_size=5), st.binary(max_size=200))
def test_only_the_field_that_is_rewritten_changes(contents: list[bytes], other: bytes) -> None:
    def message(change: bytes) -> bytes:
        return field_bytes(3, other) + b"".join(field_bytes(4, content + change) for content in contents) + b"\x10\x05"

    data = message(b"")
    assert rewritten(data, (0, len(data)), 4, lambda span: data[slice(*span)] + b"!" * 130) == message(b"!" * 130)
