"""Kills a process of ours at its n-th operation on files, or fails all from there on, for every n.

Python tells an audit hook of everything that is done to files before it is done; the hook of a forked process ends it
there as ``kill -9`` does, with what it had buffered, or has the operation fail. Exchanges of folders tell of themselves
(trust/replace.py).
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

EVENTS = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "fcntl.flock", "shutil.copyfile", "shutil.rmtree", "os.utime",
}  # fmt: skip
_FINISHED = 0


def kill_at_every_moment(work: Callable[[], object], under: str) -> Iterator[int]:
    """Run ``work`` in a process that is killed before its first operation under a folder, then its second, and so on.

    Yields the number of operations done after each kill; ends when the work has come to its end.
    """
    moment = 0
    while True:
        process = os.fork()
        if process == 0:
            _die_at(work, under, moment)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status == _FINISHED:
            return
        assert status == -signal.SIGKILL, f"the work failed by itself at moment {moment}"
        yield moment
        moment += 1


def fail_at_every_moment(work: Callable[[], object], under: str, number: int) -> Iterator[str]:
    """The same, but from its n-th writing operation on all of them fail with the system's error ``number``.

    Yields what ``work`` raised, as ``kind: text``; ends when it comes to its end.
    """
    moment = 0
    while True:
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            _fail_from(work, under, moment, number, writer)
        os.close(writer)
        with open(reader, encoding="utf-8") as told:
            said = told.read()
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == _FINISHED
        if not said:
            return
        yield said
        moment += 1


def _fail_from(work: Callable[[], object], under: str, moment: int, number: int, writer: int) -> None:
    left = moment

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event in ("os.mkdir", "os.link") or (event == "open" and arguments[2] & (os.O_CREAT | os.O_WRONLY))
        if writes and any(_is_under(each, under) for each in arguments):
            if left == 0:
                raise OSError(number, os.strerror(number), os.fsdecode(arguments[0]))
            left -= 1

    code = 1
    try:
        sys.addaudithook(hook)
        work()
        code = _FINISHED
    except Exception as error:
        os.write(writer, f"{type(error).__name__}: {error}".encode())
        code = _FINISHED
    finally:
        os._exit(code)


def _die_at(work: Callable[[], object], under: str, moment: int) -> None:
    """In the forked process: never returns."""
    left = moment

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in EVENTS and (event == "fcntl.flock" or any(_is_under(each, under) for each in arguments)):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    try:
        sys.addaudithook(hook)
        work()
        os._exit(_FINISHED)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _is_under(argument: Any, folder: str) -> bool:
    return isinstance(argument, str | bytes | os.PathLike) and os.fsdecode(argument).startswith(folder)
