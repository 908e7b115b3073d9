"""Kinds of strangers' JSON: what is wrong is told with the field's name, and nothing of it reaches a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from d3tom_export.errors import D3tomError
from d3tom_export.trust.schema import Count, Fields, Sha256, Text, check_kinds, fields_of


@dataclass
class Inner:
    share: float
    steps: int = 3


@dataclass
class Outer:
    name: str
    inner: Inner


class Named(Fields, frozen=True):
    text: Text
    count: Count
    digest: Sha256
    outer: fields_of(Outer)  # type: ignore[valid-type]


def _raw(**changes: Any) -> dict[str, Any]:
    inner = {"share": 1, "steps": 2}
    return {"text": "a", "count": 0, "digest": "0" * 64, "outer": {"name": "b", "inner": inner}} | changes


def test_what_fits_passes() -> None:
    check_kinds(_raw(), Named, "file", "Mend it.")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text": "x" * 1001}, "file, text: expected str of length <= 1000. Mend it."),
        ({"text": None}, "file, text: expected str, got null"),
        ({"count": -1}, "file, count: expected int >= 0"),
        ({"count": 2**61}, "file, count: expected int <= 1152921504606846976"),
        ({"count": True}, "file, count: expected int, got bool"),
        ({"digest": "A" * 64}, "file, digest: expected str matching"),
        ({"outer": {"name": "b", "inner": {"share": 1}}}, "file, outer.inner: object missing required field steps"),
        ({"outer": {"name": "b", "inner": {"share": "1", "steps": 2}}}, "outer.inner.share: expected float, got str"),
        ({"\x1b[2J": 1}, r"\x1b[2J"),
        ({"more": 1}, "object contains unknown field more"),
    ],
)
def test_what_does_not_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(D3tomError) as caught:
        check_kinds(_raw(**changes), Named, "file", "Mend it.")
    assert says in str(caught.value)
    assert str(caught.value).isprintable()
