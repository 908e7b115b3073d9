"""The user's cache folder: what this machine would otherwise have to work out anew.

Everything in it may be absent, stale, cut short or planted, and nobody may be stopped by it: what cannot be read is not
there, what cannot be written is not kept. A folder or file that another user could have put there does not count.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from d3tom_export.trust.replace import replace_file

_NAME = "d3tom-export"


def cache_folder() -> Path | None:
    """``d3tom-export`` in ``$XDG_CACHE_HOME``, or else in ``~/.cache``; None where there is no home either."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / _NAME
    with suppress(RuntimeError):
        home = Path.home()
        if home.is_absolute():
            return home / ".cache" / _NAME
    return None


@dataclass(frozen=True)
class UserCache:
    """Files of one kind.

    Args:
        kind: The name of their folder in :func:`cache_folder`.
        most: How many are kept at most; those that were not read or written for longest go.
        limit: Bytes that one may have.
    """

    kind: str
    most: int
    limit: int

    def read(self, name: str) -> bytes | None:
        """What is kept under ``name``; None where there is nothing of ours, or nothing that can be read."""
        folder = self._folder()
        if folder is None:
            return None
        flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        try:
            descriptor = os.open(folder / name, flags)
        except (OSError, ValueError):
            return None
        with open(descriptor, "rb") as file:
            try:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size > self.limit:
                    return None
                content = file.read(self.limit + 1)
            except OSError:
                return None
        if len(content) > self.limit:
            return None
        with suppress(OSError):
            os.utime(folder / name, follow_symlinks=False)  # the oldest go: what is read is not old
        return content

    def write(self, name: str, content: bytes | memoryview) -> bool:
        """Keep ``content`` under ``name``, whole or not at all, in place of what was there; whether that worked."""
        if len(content) > self.limit:
            return False
        folder = self._folder(make=True)
        if folder is None:
            return False
        try:
            replace_file(folder / name, content)
        except OSError:
            return False
        for path in list(self._oldest(folder))[: -self.most]:
            with suppress(OSError):
                path.unlink()
        return True

    def remove(self, name: str) -> None:
        """Drop what is kept under ``name``."""
        folder = self._folder()
        if folder is not None:
            with suppress(OSError):
                (folder / name).unlink()

    def path(self, name: str) -> Path | None:
        """Where ``name`` would lie, for messages."""
        folder = cache_folder()
        return None if folder is None else folder / self.kind / name

    def _folder(self, *, make: bool = False) -> Path | None:
        """The folder of this kind, where it is the user's own and nobody else may write there."""
        outer = cache_folder()
        if outer is None:
            return None
        folder = outer / self.kind
        try:
            if make:
                outer.parent.mkdir(parents=True, exist_ok=True)
                for each in (outer, folder):
                    each.mkdir(mode=0o700, exist_ok=True)
            for each in (outer, folder):
                found = each.lstat()
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                    return None
        except (OSError, ValueError):
            return None
        return folder

    def _oldest(self, folder: Path) -> Iterator[Path]:
        """The files of ``folder``, the oldest first; not those that are being written."""
        times: list[tuple[int, str]] = []
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with suppress(OSError):
                    if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                        times.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name))
        return (folder / name for _, name in sorted(times))
