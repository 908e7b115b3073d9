"""Texts at which an answer ends: what of it may be said."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Stop texts of a request. The loop looks for their tokens, which other tokens may spell too: texts decide here."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)

    def cut(self, text: str) -> tuple[str, bool]:
        """``text`` up to the first stop, and whether there was one."""
        places = [at for at in (text.find(stop) for stop in self._texts) if at >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def said(self, text: str) -> str:
        """What of ``text``, an answer's beginning, stays whatever follows: no stop, nor the beginning of one."""
        text, found = self.cut(text)
        if found:
            return text
        begun = (n for stop in self._texts for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]
