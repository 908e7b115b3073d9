"""Files of a folder by what is on the disk: a file may have several names, hard links, in the folder and outside it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileOnce:
    """A file, under the first of the names that it has in a folder."""

    path: Path
    bytes: int
    elsewhere: bool
    """Whether it has names outside the folder, too."""


def files_once(folder: Path) -> list[FileOnce]:
    """The regular files in ``folder`` and below, each once; symbolic links are left out."""
    found: dict[tuple[int, int], tuple[os.stat_result, list[Path]]] = {}
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in sorted(names)):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                found.setdefault((status.st_dev, status.st_ino), (status, []))[1].append(path)
    return [FileOnce(paths[0], status.st_size, status.st_nlink > len(paths)) for status, paths in found.values()]
