"""Texts at which an answer ends: what of it may be said."""

from __future__ import annotations

from collections.abc import Sequence

from d3tom_export.prompt.pieces import begun


class StopTexts:
    """Stop texts of a request. The loop looks for their tokens, which other tokens may spell too: texts decide here."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)

    def cut(self, text: str) -> tuple[str, bool]:
        """``text`` up to the stop that is whole first, and whether there was one.

        Another that begins before it and ends behind it comes too late: by then the answer has ended.
        """
        places = [(at + len(stop), at) for stop in self._texts if (at := text.find(stop)) >= 0]
        return (text[: min(places)[1]], True) if places else (text, False)

    def said(self, text: str) -> str:
        """What of ``text``, an answer's beginning, stays whatever follows: no stop, nor the beginning of one."""
        text, found = self.cut(text)
        if found:
            return text
        return text[: len(text) - max((begun(text, stop) for stop in self._texts), default=0)]
