"""A file of lines that only grows and outlives a kill: each is on the disk before the next is made.

A last line without an end is one that a kill cut off. One process writes at a time; nothing of others is written to.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from d3tom_export.errors import D3tomError
from d3tom_export.trust.replace import try_lock

MOST_BYTES = 4 << 30
LONGEST_LINE = 4 << 20
_WRITABLE = os.O_RDWR | os.O_CREAT | os.O_APPEND
_SAFE = os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)


class Journal:
    """Opens or creates ``path``, locked; close it.

    Args:
        path: The file.
        option: What the user gave it with, for messages.
        remedy: What to do about a file that is none of ours, a sentence.
        most_bytes: That are read of one that is there.

    Raises :class:`D3tomError` where it cannot be, is no regular file, or is being written by somebody else.
    """

    def __init__(self, path: Path, option: str, remedy: str, most_bytes: int = MOST_BYTES) -> None:
        self._path, self._remedy = path, remedy
        try:
            descriptor = os.open(path, _WRITABLE | _SAFE, 0o666)
        except OSError as error:
            raise D3tomError(
                f"The file {path} cannot be opened: {error.strerror}. Give {option} a file of yours in a folder that "
                "is there; links are not followed."
            ) from None
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > most_bytes:
                raise D3tomError(f"{path} is no regular file, or one of more than {most_bytes:,} bytes. {remedy}")
            if try_lock(descriptor) is False:
                raise D3tomError(f"Another process is writing {path}. Let it end, or give {option} another file.")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read(self, begin: bytes, what: str, take: Callable[[int, bytes], None]) -> int:
        """Give every line with its number, from 1, to ``take``; a last one that was cut off is dropped.

        Args:
            begin: How the first line begins, or all of it: a file with no end of it that begins otherwise is not ours.
            what: What a file of ours is, for messages.
            take: Raises :class:`D3tomError` for a line that is not ours; the file is then as it was.

        Returns how many lines there are.
        """
        count = whole = 0
        with os.fdopen(os.dup(self._file.fileno()), "rb") as reader:
            for number, line in enumerate(iter(lambda: reader.readline(LONGEST_LINE), b""), 1):
                if not line.endswith(b"\n"):
                    if number == 1 and not (begin.startswith(line) or line.startswith(begin)):
                        raise D3tomError(f"{self._path} is no {what}. {self._remedy}")
                    if len(line) == LONGEST_LINE:
                        raise D3tomError(
                            f"{self._path}, line {number}: longer than {LONGEST_LINE:,} bytes. {self._remedy}"
                        )
                    break
                take(number, line)
                count, whole = number, whole + len(line)
        self._file.truncate(whole)
        return count

    def append(self, lines: bytes) -> None:
        """Write whole lines, and return when they are on the disk. Raises :class:`D3tomError` where that fails."""
        try:
            view = memoryview(lines)
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise D3tomError(
                f"An answer cannot be written to {self._path}: {error.strerror}. Make room; the same command then goes "
                "on with the answers that are there."
            ) from None
