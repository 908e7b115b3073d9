"""Files and folders put in the place of others: at every moment the old one is there or the new one, whole.

What is not in its place yet bears a name of its own and is locked while somebody works on it, so that what a killed
process left is told from what is being written. Locks end with the process that holds them, whatever ends it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d3tom_export.errors import D3tomError

_NOREPLACE, _EXCHANGE = 1, 2
"""Flags of Linux's renameat2."""
_AT_FDCWD = -100
_NO_SUCH_CALL = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)
"""What kernels and file systems answer that do not know a flag."""
_TRIES = 8


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder; False where somebody else holds it, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def create_locked(path: Path) -> int | None:
    """Create a file, locked where the file system has locks; None where somebody swept it away meanwhile.

    Raises ``FileExistsError`` where there is one, be it a link.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        if try_lock(descriptor) is not False:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.lstat()):
                    return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write ``path``, or put a new file in its place; what killed processes left of it is removed."""
    with partial_file(path) as (partial, descriptor):
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        partial.replace(path)


@contextmanager
def partial_file(path: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside ``path``, locked and open, to be put in its place; what killed processes left is removed.

    It is removed where an exception leaves the context.
    """
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.partial")
    for other in _entries(path.parent):
        if left.fullmatch(other):
            _remove_unlocked(path.with_name(other))
    for _ in range(_TRIES):
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            descriptor = create_locked(partial)
        except FileExistsError:
            continue
        if descriptor is None:
            continue
        try:
            yield partial, descriptor
            return
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _remove_unlocked(partial: Path) -> None:
    """Remove a file of ours that nobody is writing any more."""
    with suppress(OSError):
        descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
        try:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and try_lock(descriptor):
                partial.unlink()
        finally:
            os.close(descriptor)


def _renameat2() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Linux's rename with a flag; False where kernel, file system or libc do not know it."""
    call = _renameat2()
    if call is None:
        return False
    sys.audit("os.rename", str(source), str(target), -1, -1)
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_SUCH_CALL:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def exchange(one: Path, other: Path) -> bool:
    """Exchange two entries of a file system in one step; False where it cannot (nothing was done then)."""
    return _rename(one, other, _EXCHANGE)


def rename_new(source: Path, target: Path) -> None:
    """Rename a folder to a name that must be free. Raises ``FileExistsError`` where it is not."""
    if _rename(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def replace_inside(folder: Path, name: str, content: bytes | memoryview) -> None:
    """Write the file ``name`` of ``folder``, which may be a stranger's, in folders made for it: :func:`replace_file`.

    What is there is replaced, never written into: it may be a link, or have another name elsewhere.

    Raises :class:`D3tomError` where a folder on the way is a link that leads out.
    """
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent.resolve() != folder.resolve() / path.parent.relative_to(folder):
        raise D3tomError(f"{path.parent} is a link that leads out of {folder}. Remove it and run this again.")
    replace_file(path, content)
