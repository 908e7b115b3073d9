"""Files of others: found by plain names inside their folder, opened once, looked at on the open file, never written.

A name that a checkpoint, an index, a manifest or a sample set gives is data. It becomes a path only here, and only if
it leads to a regular file inside the folder; the one way out is the layout of a hub's cache, whose snapshots hold
links into the blobs beside them. What we write is created new: no existing file is opened for writing, no link
followed.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from d3tom_export.errors import D3tomError

_BLOB_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""Of a file in a hub cache's ``blobs``: git's sha1 of it, or sha256 of a large one."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_name(name: object, *, suffix: str = "") -> str:
    """``name`` if it is one of a file within a folder: relative, without ``..``, printable, ending in ``suffix``.

    Folders in it are parted by ``/``. Raises :class:`D3tomError` otherwise.
    """
    if not isinstance(name, str) or not name:
        raise D3tomError(f"{name!r} is no name of a file.")
    parts = name.split("/")
    plain = name.isprintable() and "\\" not in name and all(part not in ("", ".", "..") for part in parts)
    if not plain or max(len(os.fsencode(part)) for part in parts) > 255:
        raise D3tomError(f"{name!r} is no plain name of a file inside its folder.")
    if not name.endswith(suffix) or name == suffix:
        raise D3tomError(f"{name!r} does not end in {suffix}.")
    return name


def is_there(folder: Path, name: str) -> bool:
    """Whether ``folder`` has an entry of this name, of whatever kind: a broken link and a pipe are there too."""
    return os.path.lexists(folder / name)


def find_inside(folder: Path, name: str) -> Path:
    """The real path of the regular file ``name`` of ``folder``, which no link leads out of.

    Links may lead to regular files inside the folder, or, where the folder is a snapshot of a hub's cache, to the
    blobs of that cache. Raises :class:`D3tomError` where the name is not plain, or where there is no such file.
    """
    check_name(name)
    path = folder / name
    try:
        root, real = folder.resolve(strict=True), path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        broken = " (it is a link to nothing)" if path.is_symlink() else ""
        raise D3tomError(f"{path} does not exist{broken}. Fetch the missing file.") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise D3tomError(f"{path} cannot be read: {_reason(error)}. Fetch the folder again.") from None
    if not real.is_relative_to(root) and not _is_blob_of(root, real):
        raise D3tomError(
            f"{path} is a link that leads out of its folder, to {real}. Links are followed inside the folder, and from "
            "a snapshot of a hub's cache into its blobs. Put the file itself there."
        )
    _check_regular(path, mode)
    return real


def _is_blob_of(root: Path, real: Path) -> bool:
    """Whether ``real`` is a blob of the hub cache that ``root``, both without links, is a snapshot of."""
    snapshots = root.parent
    return (
        snapshots.name == "snapshots"
        and real.parent == snapshots.parent / "blobs"
        and _BLOB_NAME.fullmatch(real.name) is not None
    )


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((kind for test, kind in _KINDS if test(mode)), "not a file")
        raise D3tomError(f"{path} is {kind}, expected a regular file. Put the file itself there.")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; nothing else is waited for or read.

    ``path`` is the user's, or one that :func:`find_inside` gave. Raises :class:`D3tomError` where it is none.
    """
    try:
        # A pipe without a writer would keep us waiting for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise D3tomError(f"{path} does not exist. Check the path, or fetch the missing file.") from None
    except OSError as error:
        raise D3tomError(f"{path} cannot be read: {_reason(error)}. Check the path and its permissions.") from None
    except ValueError:
        raise D3tomError(f"{str(path)!r} is no path of a file.") from None
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a regular file of at most ``limit`` bytes. Raises :class:`D3tomError` where it is longer or unreadable."""
    with open_file(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise D3tomError(f"{path} cannot be read: {_reason(error)}. Fetch the file again.") from None
        if len(content) > limit:
            size = max(os.fstat(file.fileno()).st_size, len(content))
            raise D3tomError(
                f"{path} has {size:,} bytes, at most {limit:,} are expected of such a file. Fetch it again."
            )
        return content


def create_file(path: Path) -> BinaryIO:
    """Create a file and open it for writing: it must not exist, not even as a link. Raises ``FileExistsError``."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is not there yet (:func:`create_file`)."""
    with create_file(path) as file:
        file.write(content)


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file to one that is not there yet (:func:`open_file`, :func:`create_file`)."""
    with open_file(source) as reader, create_file(target) as writer:
        shutil.copyfileobj(reader, writer, 1 << 22)


def relative_name(path: Path, folder: Path) -> str:
    """``path``'s name within ``folder``, as manifests spell it."""
    return PurePosixPath(*path.relative_to(folder).parts).as_posix()
