"""The standard streams of a process of ours, which its user may have closed, or may close while it runs."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


def open_missing() -> None:
    """Open standard streams that were closed (``>&-``) on the null device, and let nobody's end stop the messages.

    Otherwise the next file that is opened, a bundle's for instance, gets a stream's number and with it whatever a
    library prints.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(opened, True)
    sys.stderr = _messages()


def _messages() -> TextIO:
    """Standard error for messages and progress: where nobody reads them any more, they are dropped."""
    former = sys.stderr
    encoding = getattr(former, "encoding", None) or "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(_Messages()), encoding, "backslashreplace", line_buffering=True)


class _Messages(io.RawIOBase):
    """File descriptor 2; what it refuses goes nowhere, for good."""

    name = "<stderr>"
    mode = "w"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return os.isatty(2)

    def write(self, data: Any) -> int:
        try:
            return os.write(2, data)
        except OSError:
            _drop(2)
            return len(data)


def _drop(number: int) -> None:
    """From now on a stream's output goes nowhere, what is buffered for it included."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


def settle() -> bool:
    """Write out what is buffered, at the process's end; whether standard output took it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        _drop(1)
        return False
    return True
