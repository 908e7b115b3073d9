"""Zip files of strangers: members are read by name into memory, within limits, and never unpacked to files."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from d3tom_export.errors import D3tomError, printable
from d3tom_export.trust.files import open_file

_MOST_BYTES = 1 << 32
"""Of an archive. Only what is asked for is read of it."""

_LONGEST_READ = 8 << 20
"""Bytes that the archive's own parts may take: its table of members is read at once, 65,535 of them take 5 MB."""

_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


class _Bounded:
    """A file to :mod:`zipfile`, which reads the table of members in one piece, of the size that the file claims."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > _LONGEST_READ:
            raise ValueError(f"its table of members takes {size:,} bytes, at most {_LONGEST_READ:,} are read")
        return self._file.read(size if size >= 0 else _LONGEST_READ)


class Archive:
    """An open zip file; every failure is a ``ValueError`` whose words can stand in a message."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def read(self, name: str, limit: int) -> bytes:
        """All of a member of at most ``limit`` bytes, by what its header says and by what comes out."""
        with _in_words():
            try:
                member = self._archive.getinfo(name)
            except KeyError:
                raise ValueError(f"it has no {printable(name, 80)}") from None
            shown = printable(name, 80)
            if member.flag_bits & 0x41:
                raise ValueError(f"{shown} in it is encrypted")
            if member.compress_type not in _METHODS:
                raise ValueError(f"{shown} in it is compressed in a way that is not read here (only deflate is)")
            if member.file_size > limit:
                raise ValueError(f"{shown} in it has {member.file_size:,} bytes, at most {limit:,} are read")
            with self._archive.open(member) as file:
                content = file.read(limit + 1)
            if len(content) > limit:
                raise ValueError(f"{shown} in it has more than {limit:,} bytes")
            return content


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    except MemoryError:
        raise ValueError("reading it takes more memory than there is") from None
    except Exception as error:  # BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError, …
        raise ValueError(printable(str(error), 200) or type(error).__name__) from None


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a zip file. Raises :class:`D3tomError` where ``path`` is none that is read, ``ValueError`` if damaged."""
    with open_file(path) as file:
        size = file.seek(0, io.SEEK_END)
        if size > _MOST_BYTES:
            raise D3tomError(f"{path} has {size:,} bytes, at most {_MOST_BYTES:,} are read of an archive.")
        with _in_words():
            archive = zipfile.ZipFile(_Bounded(file))
        with archive:
            yield Archive(archive)
