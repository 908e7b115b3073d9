"""How long work reports itself: library code calls, the command line shows."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as (what is being done, parts done, parts in all)."""


def no_progress(what: str, done: int, total: int) -> None:
    """A :data:`Progress` that shows nothing."""


Note = Callable[[str], None]
"""Called with a sentence that users should read while the work goes on: that a picture was scaled down, say."""


def no_note(sentence: str) -> None:
    """A :data:`Note` that nobody reads."""
