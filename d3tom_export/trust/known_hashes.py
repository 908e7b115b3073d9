"""sha256 of files that this machine has worked out before, believed for as long as the files look untouched.

Hashing 34 GB takes most of a minute, and a bundle is opened again and again. So a file's hash is kept in the user's
cache folder, never beside the file, with the size, times, inode and device that the file had: whoever writes to it, or
puts another in its place, changes one of them. What that does not see is told in docs/trust.md.

A hash is kept of a file, not of a name in a manifest: a manifest that lists another one is held against the file again.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from d3tom_export.trust.user_cache import UserCache

RECORDS = UserCache("verified", most=256, limit=4 << 20)
"""One record a folder. An entry takes 0.2 kB: an 8B bundle with engines for four GPUs takes 60 kB."""

_SCHEMA = 1
_YOUNG = 2_000_000_000
"""Nanoseconds. File systems count time in steps, the coarsest in twos of seconds: a file that was written so shortly
before it was hashed may be written once more without looking otherwise. Its hash is not kept (git does the same)."""


class _Record(msgspec.Struct, frozen=True):
    schema: int
    files: dict[str, tuple[str, str]]
    """By name in the folder: what the file looked like, and its sha256."""


def file_sha256_of(file: BinaryIO) -> str:
    """Hexadecimal sha256 of what is left of an open file, read in pieces."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 22):
        digest.update(chunk)
    return digest.hexdigest()


def _looks(status: os.stat_result) -> str:
    """What changes when a file is written or replaced. Of the times, nobody can set the second (st_ctime)."""
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{status.st_size} {times} {status.st_ino} {status.st_dev}"


class KnownHashes:
    """The known hashes of one folder's files.

    The folder is known by its inode, which it keeps when it is renamed: what a build hashed is known when its bundle
    takes its place. Threads may ask at the same time.

    Args:
        folder: The files' folder.
        anew: Whether to believe nothing and hash everything; what is found is kept all the same.
    """

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        self._folder = folder
        try:
            status = folder.stat()
            self._name = f"{status.st_dev:x}-{status.st_ino:x}.json"
        except OSError:
            self._name = ""
        self._known = {} if anew else self._read()
        self._found: dict[str, tuple[str, str] | None] = {}

    def is_sha256(self, name: str, file: BinaryIO, sha256: str) -> bool:
        """Whether the open ``file``, called ``name``, has this hash; hashed only where that is not known."""
        return (
            self._known.get(name) == (_looks(os.fstat(file.fileno())), sha256) or self.hash_file(name, file) == sha256
        )

    def sha256_of(self, name: str, file: BinaryIO) -> str:
        """The hash of the open ``file``, called ``name``; worked out only where it is not known."""
        looks, known = self._known.get(name, ("", ""))
        return known if looks == _looks(os.fstat(file.fileno())) else self.hash_file(name, file)

    def hash_file(self, name: str, file: BinaryIO) -> str:
        """Hash the open ``file``, called ``name``, whatever is known."""
        began, before = time.time_ns(), os.fstat(file.fileno())
        found = file_sha256_of(file)
        unchanged = _looks(before) == _looks(os.fstat(file.fileno()))
        self._found[name] = (_looks(before), found) if unchanged and before.st_mtime_ns < began - _YOUNG else None
        return found

    def save(self) -> None:
        """Keep what was found, where there is somewhere to keep it."""
        if not self._name or not self._found:
            return
        kept = self._read()  # another process may have found more meanwhile
        files = {name: entry for name, entry in (kept | self._found).items() if entry is not None}
        files = {name: entry for name, entry in files.items() if os.path.lexists(self._folder / name)}
        if files != kept:
            RECORDS.write(self._name, msgspec.json.encode(_Record(_SCHEMA, files)))
        self._found.clear()

    def _read(self) -> dict[str, tuple[str, str]]:
        content = RECORDS.read(self._name) if self._name else None
        if content is None:
            return {}
        try:
            record = msgspec.json.decode(content, type=_Record)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return {}
        return record.files if record.schema == _SCHEMA else {}
