"""The one exception that reaches users.

Every failure a user can cause or mend is a :class:`D3tomError` whose text is one paragraph: what failed, under the
name the user knows it by, what was expected, what was found, and what to do next. The command line prints that
paragraph and exits with 1; a trace appears only with ``--debug``.
"""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST = 4000
"""Characters of a paragraph. One that strangers' names or a runtime's own words made longer loses its middle."""


def printable(text: str, longest: int = _LONGEST) -> str:
    """``text`` as one line that a terminal shows and does not obey, of at most about ``longest`` characters.

    Whatever strangers wrote may be in it: line breaks become blanks, other control characters their escapes.
    """
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} […{len(text) - 2 * half:,} characters left out…] {text[-half:]}"
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)


class D3tomError(Exception):
    """A failure with a remedy; ``str(error)`` is the paragraph to show, see :func:`printable`."""

    def __init__(self, paragraph: str) -> None:
        super().__init__(printable(paragraph))


class CallError(D3tomError):
    """One that no file or machine has to do with: what was asked for cannot be. The command line exits with 2."""


class UnexpectedError(D3tomError):
    """One that nothing says is of what was asked: a runtime failed, and may do better another time."""


class SizeError(D3tomError):
    """A prompt or an answer of a size that the engines here are not built for: of another size they answer."""


def listing(items: Iterable[object], limit: int = 12) -> str:
    """``items`` joined by commas, shortened to ``limit`` entries with a count of the rest."""
    names = [printable(str(item), 200) for item in items]
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
