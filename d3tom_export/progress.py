"""How long work reports itself: library code calls, the command line shows."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as (what is being done, parts done, parts in all)."""


def no_progress(what: str, done: int, total: int) -> None:
    """A :data:`Progress` that shows nothing."""


Note = Callable[[str], None]
"""Called with a sentence that users should read though the work goes on: a picture scaled down, its first frame taken."""


def no_note(sentence: str) -> None:
    """A :data:`Note` that nobody reads."""
