"""A file of lines that only grows and outlives a kill: each is on the disk before the next is made.

A last line without an end is one that a kill cut off. One process writes at a time; nothing of others is written to.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from d3tom_export.errors import D3tomError
from d3tom_export.trust.replace import partial_file, try_lock

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
            self._size = status.st_size
            self._check_there()
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
        with self._reader() as reader:
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
        self._size = whole
        return count

    def _reader(self) -> BinaryIO:
        """The file from its start, read apart from what is written."""
        reader = open(self._path, "rb")  # noqa: SIM115
        try:
            self._check_there()
        except BaseException:
            reader.close()
            raise
        return reader

    def _check_there(self) -> None:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.lstat()):
                return
        raise D3tomError(f"Another process has put a file in the place of {self._path}. Run this again.")

    def lines(self) -> Iterator[bytes]:
        """All lines, read apart from what is written."""
        with self._reader() as reader:
            yield from reader

    @contextmanager
    def rewritten(self) -> Iterator[Callable[[bytes], int]]:
        """What is called with the lines of a new file; it takes the place of this one, whole, at the end.

        An exception leaves the file as it was. Raises :class:`D3tomError` where the new one cannot be written.
        """
        with self._told(), partial_file(self._path) as (partial, descriptor):
            os.fchmod(descriptor, stat.S_IMODE(os.fstat(self._file.fileno()).st_mode))
            with open(descriptor, "wb", closefd=False) as file:
                yield file.write
                file.flush()
                os.fsync(descriptor)
            self._check_size()
            partial.replace(self._path)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
            self._file.close()
            self._file = os.fdopen(os.dup(descriptor), "r+b", buffering=0)  # locked from its start
            self._size = os.fstat(descriptor).st_size

    def _check_size(self) -> None:
        """Where the file system has no locks, its length tells of others."""
        size = os.fstat(self._file.fileno()).st_size
        if size != self._size:
            raise D3tomError(
                f"Another process is writing {self._path}: it has {size:,} bytes, and this one left "
                f"{self._size:,}. Its file system has no locks. Let only one go on; what both have written is damaged."
            )

    def append(self, lines: bytes) -> None:
        """Write whole lines, and return when they are on the disk. Raises :class:`D3tomError` where that fails."""
        with self._told():
            self._check_size()
            view = memoryview(lines)
            while view:
                written = self._file.write(view)
                self._size += written
                view = view[written:]
            os.fsync(self._file.fileno())

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise D3tomError(
                f"An answer cannot be written to {self._path}: {error.strerror}. Make room; the same command then goes "
                "on with the answers that are there."
            ) from None
