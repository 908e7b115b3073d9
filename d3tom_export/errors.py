"""The one exception that reaches users.

Every failure a user can cause or mend is a :class:`D3tomError` whose text is one paragraph: what failed, under the
name the user knows it by, what was expected, what was found, and what to do next. The command line prints that
paragraph and exits with 1; a trace appears only with ``--debug``.
"""

from __future__ import annotations

from collections.abc import Iterable


class D3tomError(Exception):
    """A failure with a remedy; ``str(error)`` is the paragraph to show."""


def listing(items: Iterable[object], limit: int = 12) -> str:
    """``items`` joined by commas, shortened to ``limit`` entries with a count of the rest."""
    names = [str(item) for item in items]
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
