"""Kinds, ranges and counts that strangers' JSON must have, checked by msgspec, and a paragraph for what is wrong."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import msgspec

from d3tom_export.errors import D3tomError, printable

Text = Annotated[str, msgspec.Meta(max_length=1000)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**60)]


class Fields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fields of a JSON object. All without a default must be there, and no others: a version says which there are."""


def fields_of(kind: type) -> type[msgspec.Struct]:
    """The fields of the dataclass ``kind``, of which none may be missing."""
    hints = get_type_hints(kind)
    return msgspec.defstruct(
        kind.__name__,
        [
            (field.name, fields_of(hint) if is_dataclass(hint := hints[field.name]) else hint)  # type: ignore[arg-type]
            for field in fields(kind)
        ],
        forbid_unknown_fields=True,
    )


def check_kinds(raw: object, kind: Any, name: str, remedy: str) -> Any:
    """``raw``, parsed JSON, as ``kind``. Nothing is converted but whole numbers where any are expected.

    Raises :class:`D3tomError` that names ``name``'s field and what was expected of it.
    """
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `")
        what, place = re.sub(r"[`]", "", what), place.rstrip("`").removeprefix("key in ").lstrip("$.")
        where = f"{name}, {printable(place, 120)}" if place else name
        raise D3tomError(f"{where}: {what[:1].lower()}{printable(what[1:], 300)}. {remedy}") from None
