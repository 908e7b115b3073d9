"""Text of strangers on a terminal, which would obey what is in it."""

from __future__ import annotations

import unicodedata

_MIRRORS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Code points that turn the direction of the text around them, and so what it seems to say."""


def legible(text: str) -> str:
    """``text`` with its line breaks and tabs; other control characters and turns of direction become their escapes."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape", "backslashreplace").decode()
        if c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Cs") or ord(c) in _MIRRORS)
        else c
        for c in text
    )
