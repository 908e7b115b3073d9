"""Pictures in text: data URIs, which JSON carries in place of bytes."""

from __future__ import annotations

import base64
import binascii
import re

from d3tom_export.errors import printable

_HEAD = re.compile(r"data:image/[\w.+-]{1,80}(?:;[\w.+-]{1,80}=[\w.+-]{1,80}){0,4};base64", re.IGNORECASE)


def base64_of(uri: str) -> str | None:
    """The base64 in a picture's data URI; None for any other text, addresses among them."""
    head, comma, data = uri.partition(",")
    return data if comma and _HEAD.fullmatch(head) else None


def decoded(data: str) -> bytes:
    """The bytes of base64 ``data``, which is a stranger's. Raises ``ValueError`` saying what is wrong with it."""
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:  # the latter of text that is not ASCII
        raise ValueError(f"is no base64: {printable(str(error), 200)}") from None
