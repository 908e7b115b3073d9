"""``run --live``: an answer on standard error while it is denoised, in place on a terminal, line by line elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from .common import ConsoleProgress
from .drawing import cleared, frame, painted, window, wrapped

if TYPE_CHECKING:
    from d3tom_export.api.answers import Step

_SIZE = os.terminal_size((80, 24))
"""Of a terminal that does not tell its own."""


class LiveAnswer:
    """Shows an answer's steps on standard error; a context, at whose end a terminal is as it was before.

    On a terminal every step is drawn in the place of the one before, with a line that says how far it is, on as many
    rows as there are. Where standard error is no terminal, or one that moves no cursor (``TERM=dumb``), a step is one
    line. ``NO_COLOR`` leaves the colour out.

    Args:
        start: What there is before the first step.
        seconds: The clock that steps are timed by.
    """

    def __init__(self, start: Step, seconds: Callable[[], float]) -> None:
        self._start, self._seconds = start, seconds
        self._draws = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._encoding = sys.stderr.encoding or "utf-8"
        self._lines = 0

    def __enter__(self) -> LiveAnswer:
        ConsoleProgress.close()
        if self._draws:  # at real sizes the first step takes its time
            self(self._start)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines:
            click.echo(cleared(self._lines), nl=False, err=True, color=True)
            self._lines = 0

    def __call__(self, reached: Step) -> None:
        """Show a step that was run."""
        pieces = reached.pieces(self._encoding)
        step = f"step {reached.number}/{reached.total}"
        seen = reached.visual_tokens
        visual = f", {reached.kept} of {seen} visual tokens kept" if seen else ""
        if not self._draws:
            line = "".join(piece.text for piece in pieces).replace("\n", "\\n")
            click.echo(f"[{self._seconds():7.2f} s] {step}{visual}: {line}", err=True)
            return
        columns, rows = _size()
        lines = wrapped(pieces, columns)
        shown = window(lines, rows - 1)
        status = f"{step}, {self._seconds():.1f} s{visual}"
        if len(lines) > rows - 1 > 0:
            status += f", lines {shown.start + 1}-{min(shown.stop, len(lines))} of {len(lines)}"
        colour = not os.environ.get("NO_COLOR")
        drawn = [*(painted(line, colour=colour) for line in lines[shown]), status[:columns]]
        # A terminal that got narrower meanwhile may have folded what stands there: its remains stay above, since
        # another one would not fold, and there the same way up leads to what others wrote.
        drawing = frame(drawn, min(self._lines, rows))
        self._lines = len(drawn)  # first: what an interrupt keeps from being written goes out with the clearing
        click.echo(drawing, nl=False, err=True, color=True)


def _size() -> os.terminal_size:
    """That of the terminal behind standard error: standard output may be another, or a file."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except OSError:  # it was closed
        return _SIZE
    return os.terminal_size((size.columns or _SIZE.columns, size.lines or _SIZE.lines))
