"""Output folders: written whole or not at all, whatever ends the build; what killed builds left is cleared away.

An output is a bundle, or another :class:`Kind` of folder with a file that lists the others. A build works in a folder
of its own beside its output, ``.NAME.partial-HOST-PROCESS-RANDOM``:

* ``lock``: locked for as long as the build lives, by a lock that ends with it, even where it is killed;
* ``new``: what becomes the output;
* ``old``: the output that is being replaced, for the moment between two renames. Only file systems that cannot exchange
  two folders in one step ever see it.

A folder without its build is removed by the next build of the same output if it holds nothing but what builds write,
and if its build is known to be dead: on this machine by the lock, on another one (file systems are shared, and not all
of them share locks) by its age.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from d3tom_export.bundle.links import files_once
from d3tom_export.bundle.manifest import ENGINES_FOLDER, MANIFEST_FILE
from d3tom_export.errors import D3tomError, listing
from d3tom_export.trust.documents import read_json
from d3tom_export.trust.replace import create_locked, exchange, rename_new, replace_file, try_lock

LOCK_FILE, NEW_FOLDER, OLD_FOLDER = "lock", "new", "old"
_TRIES = 8

ABANDONED_HOURS = 24
"""Without a change for so long, a folder whose build may run on another machine is taken for a killed one's."""

_PARTIAL = re.compile(r"partial-(?:(?P<host>[0-9a-f]{8})-)?(?P<process>\d+)-[0-9a-f]{8}(?P<replaced>-replaced)?")
"""What follows the output's name. Earlier versions wrote no host, and moved the bundle that they replaced to a
``-replaced`` beside it."""

_LONGEST_NAME = 200
"""Bytes of an output's name that are repeated in that of its folder: file systems take 255 in all."""

_WRITTEN = re.compile(r"\.?[^/]+\.(onnx|safetensors|json|zip|plan|cache)(\.[0-9a-f]{32}|\.[0-9a-f]{8}\.partial)?")
"""Names of the files that builds write, and of those that they write for the moment."""

_TARGET = r"(tensorrt|tensorrt-rtx)-sm\d+-(fp32|fp16|bf16)"
_BEING_ADDED = re.compile(
    rf"[^/]+\.(fp32|fp16|bf16)-(plugin|aot|onnx)\.onnx"
    rf"|{ENGINES_FOLDER}/(\.partial-[^/]+/)?{_TARGET}/[^/]+\.(plan|json)"
    rf"|{ENGINES_FOLDER}/timing-[^/]+\.cache"
    r"|(cpu/int8|half/(fp16|bf16))/[^/]+\.onnx"
)
"""Files that a killed build of engines, int8 graphs or half-precision graphs leaves before the manifest lists them."""


@dataclass(frozen=True)
class Kind:
    """What an output folder is."""

    name: str
    """What messages call it."""
    record: str
    """Its JSON file that lists the others (``files``, by path) and what wrote them (``created_by``), written last."""
    written: re.Pattern[str]
    """Names of the files in it, and of those that are written for the moment."""
    added: re.Pattern[str] | None = None
    """Paths of files that may lie in it unlisted."""


BUNDLE = Kind("bundle", MANIFEST_FILE, _WRITTEN, _BEING_ADDED)

_HALF_WRITTEN = re.compile(r"([^/]+/)*\.[^/]+\.([0-9a-f]{8}\.partial|[0-9a-f]{32})")
"""Those among them that were still being written."""


def _files(folder: Path) -> Iterator[str]:
    """Names of everything in ``folder`` but folders; a link is never followed."""
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in (*names, *links):
            yield Path(root, name).relative_to(folder).as_posix()


def _listed(folder: Path, kind: Kind) -> dict[str, object] | None:
    """What the record in ``folder`` lists, where it is one of ours."""
    if folder.is_symlink() or not (folder / kind.record).is_file():
        return None
    try:
        raw = read_json(folder / kind.record)
    except D3tomError:
        return None
    created_by, listed = raw.get("created_by"), raw.get("files")
    ours = isinstance(created_by, dict) and "d3tom_export" in created_by and isinstance(listed, dict)
    return listed if ours else None


def _is_ours(folder: Path, kind: Kind) -> bool:
    """Whether ``folder`` is of ``kind`` and holds nothing that no build writes: only then may it be replaced."""
    listed = _listed(folder, kind)
    if listed is None:
        return False
    return all(
        name in listed
        or name == kind.record
        or (kind.added is not None and kind.added.fullmatch(name))
        or _HALF_WRITTEN.fullmatch(name)
        for name in _files(folder)
    )


def check_output_folder(output: Path, force: bool, kind: Kind = BUNDLE) -> None:
    """Refuse an output folder that exists, unless ``force`` may replace it: if it is of ``kind`` and nothing else."""
    if not os.path.lexists(output):
        return
    if not force:
        raise D3tomError(f"Output folder {output} exists. Give another with --output, or --force to replace it.")
    if not _is_ours(output, kind):
        raise D3tomError(
            f"Output folder {output} exists and is not a {kind.name} (or holds files that no build wrote), so --force "
            "does not replace it. Give another folder with --output, or remove it yourself."
        )


@cache
def _host() -> str:
    """This machine since its last start: processes of one see each other's locks, whatever containers they are in."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        identity = socket.gethostname()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def _place(output: Path) -> tuple[Path, str]:
    """The folder that ``output`` lies in, without links, and its name there."""
    if output.name in ("", ".."):
        output = output.resolve()
    return output.parent.resolve(), output.name


def _prefix(name: str) -> str:
    encoded = os.fsencode(name)
    return f".{name if len(encoded) <= _LONGEST_NAME else hashlib.sha256(encoded).hexdigest()}."


KEPT_SHARDS = "model-?????-of-?????.safetensors*"
"""What lies in a :func:`kept_folder`, half-written ones among them: all is taken over or removed by the next build."""


def kept_folder(output: Path) -> Path:
    """Beside ``output``, where a build puts what the next one may take over. Not made here."""
    parent, name = _place(output)
    return parent / f"{_prefix(name)}quantizing"


@contextmanager
def work_folder(parent: Path, name: str, kind: Kind = BUNDLE) -> Iterator[Path]:
    """A folder in ``parent`` for work on the output called ``name``, locked for its life and removed at its end.

    Raises ``OSError`` where it cannot be made. An output that is still in its ``old`` goes back to its place.
    """
    folder, descriptor = _create(parent, name, kind)
    try:
        yield folder
    finally:
        try:
            _restore(folder / OLD_FOLDER, parent / name, kind)
            _remove(folder, kind)
        finally:
            os.close(descriptor)


def _create(parent: Path, name: str, kind: Kind) -> tuple[Path, int]:
    for _ in range(_TRIES):
        folder = parent / f"{_prefix(name)}partial-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
        # Another build may sweep it away, or its parents, while it is empty: then a new one is made.
        with suppress(FileExistsError, FileNotFoundError):
            folder.mkdir(mode=0o700, parents=True)
            try:
                descriptor = create_locked(folder / LOCK_FILE)
            except BaseException:
                _remove(folder, kind)
                raise
            if descriptor is not None:
                return folder, descriptor
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(parent))


def _remove(folder: Path, kind: Kind) -> None:
    """Remove a folder of work, the lock last: what is without one is empty."""
    for path in (folder / NEW_FOLDER, folder / OLD_FOLDER):
        with suppress(OSError):  # the record first: what has one is whole
            (path / kind.record).unlink()
        shutil.rmtree(path, ignore_errors=True)
    for entry in _entries(folder):
        if entry != LOCK_FILE:
            with suppress(OSError):
                (folder / entry).unlink()
    with suppress(OSError):
        if _entries(folder) in ([LOCK_FILE], []):
            (folder / LOCK_FILE).unlink(missing_ok=True)
            folder.rmdir()


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _restore(old: Path, place: Path, kind: Kind) -> bool:
    """Put the output that was being replaced back where nothing took its place. Whether there was something to do."""
    if os.path.lexists(place) or _listed(old, kind) is None:
        return False
    try:
        rename_new(old, place)
    except OSError as error:
        raise D3tomError(
            f"The {kind.name} {place} was being replaced and cannot be put back ({error.strerror}). It is whole in "
            f"{old}: move it to {place} yourself."
        ) from None
    return True


@contextmanager
def new_folder(output: Path, force: bool, kind: Kind = BUNDLE) -> Iterator[Path]:
    """A folder to fill; it becomes ``output`` when the block ends well, and vanishes otherwise.

    So do parent folders that had to be made for it. Raises :class:`D3tomError` where ``output`` is in the way, or
    where the disk is full, read only or gone.
    """
    check_output_folder(output, force, kind)
    with ExitStack() as undo:
        try:
            parent, name = _place(output)
            missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
            undo.callback(_remove_empty, missing)
            work = undo.enter_context(work_folder(parent, name, kind))
            (work / NEW_FOLDER).mkdir()
        except OSError as error:
            raise D3tomError(
                f"Output folder {output} cannot be written: {error}. Give another with --output."
            ) from None
        try:
            yield work / NEW_FOLDER
            _sync(work / NEW_FOLDER)
            _put_in_place(work, parent / name, output, force, kind)
        except Exception as error:
            told = _explanation(error, work, output)
            if told is None:
                raise
            raise told from error


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _sync(folder: Path) -> None:
    """Have the disk hold what was written, before a name says that it is whole; what others have links to it holds."""

    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # file systems without
                raise
        finally:
            os.close(descriptor)

    written = [file.path for file in files_once(folder) if not file.elsewhere]
    folders = [Path(root) for root, _, _ in os.walk(folder)]
    with ThreadPoolExecutor(8) as pool:  # disks take several at once
        list(pool.map(sync, [*written, *folders]))


def _put_in_place(work: Path, place: Path, output: Path, force: bool, kind: Kind) -> None:
    """Make ``new`` in ``work`` the output. One that it replaces is in ``work`` then, to be removed with it."""
    new, old = work / NEW_FOLDER, work / OLD_FOLDER
    with suppress(FileExistsError):
        if not os.path.lexists(place):
            rename_new(new, place)
            _sync_names(place.parent)
            return
    check_output_folder(output, force, kind)  # it appeared meanwhile, or is to be replaced
    with locked(place):
        # What was looked at above may have changed: what is taken out of its place is looked at again.
        if exchange(new, place):
            if not _is_ours(new, kind):
                exchange(new, place)
                check_output_folder(output, force, kind)
        else:
            os.rename(place, old)  # what ends us here is put right by work_folder, or by the next build
            if not _is_ours(old, kind):
                os.rename(old, place)
                check_output_folder(output, force, kind)
            os.rename(new, place)
    _sync_names(place.parent)


def _sync_names(folder: Path) -> None:
    """Have the disk hold the names in ``folder``."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def _explanation(error: Exception, work: Path, output: Path) -> D3tomError | None:
    """What a failure of the file system under a build means to its user; None where it is another failure."""
    if not (work / NEW_FOLDER).is_dir() or not (work / LOCK_FILE).exists():
        return D3tomError(
            f"{output} was not built: the folder that it was being built in, {work}, was removed or moved meanwhile. "
            "Nothing of it is left there. Run the build again, and leave that folder alone until it ends."
        )
    if not isinstance(error, OSError):
        return None
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _FULL:
        return D3tomError(
            f"{output} was not built: the disk is full, or its quota is ({error.strerror}){where}; "
            f"{shutil.disk_usage(work).free / 1e6:,.1f} MB are free beside the output. What was written is removed. "
            "Free some space, or give another folder with --output."
        )
    if error.errno == errno.EFBIG:
        return D3tomError(
            f"{output} was not built: a file would have become larger than the file system or the limit of this "
            f"process (`ulimit -f`) allows{where}. What was written is removed. Raise the limit, or give a folder on "
            "another file system with --output."
        )
    if error.errno in _REFUSED and (error.filename is None or str(error.filename).startswith(str(work.parent))):
        return D3tomError(
            f"{output} was not built: its folder cannot be written any more ({error.strerror}){where}. "
            "Make it writable and run the build again, or give another with --output."
        )
    if error.errno in (errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY):
        return D3tomError(
            f"{output} cannot be replaced ({error.strerror}): it is a file system of its own, or in use. "
            "Give another folder with --output."
        )
    return None


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep other builds out of the bundle in ``folder``: one at a time writes engines, further graphs, manifest.

    The lock is on the folder itself, so that nothing is left behind. Yields whether nobody else can be at work there:
    some file systems have no locks. Raises :class:`D3tomError` where somebody is.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        alone = try_lock(descriptor)
        if alone is False:
            raise D3tomError(
                f"Another process is building engines in {folder}. Wait for it to end, then run this again: what it "
                "has built by then is reused."
            )
        yield bool(alone)
    finally:
        os.close(descriptor)


def abandoned_engines(bundle: Path) -> list[Path]:
    """Folders that builds of engines were filling when they were killed, if the bundle's lock is held."""
    found = (bundle / ENGINES_FOLDER).glob(".partial-*")
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def clear_half_written(bundle: Path) -> None:
    """Remove what killed processes were writing in ``bundle``. Its lock is held: nobody writes it now."""
    for folder in abandoned_engines(bundle):
        shutil.rmtree(folder)
    for name in list(_files(bundle)):
        if _HALF_WRITTEN.fullmatch(name):
            (bundle / name).unlink(missing_ok=True)


def unlist(bundle: Path, changing: Callable[[str], bool]) -> None:
    """Take the files that are about to change out of the manifest, until it is written anew.

    A process that is killed in between leaves a bundle whose manifest is silent about them, not one that it calls
    damaged.
    """
    raw = read_json(bundle / MANIFEST_FILE)
    files = {name: entry for name, entry in raw["files"].items() if not changing(name)}
    if len(files) < len(raw["files"]):
        text = json.dumps(raw | {"files": files}, indent=2) + "\n"
        replace_file(bundle / MANIFEST_FILE, text.encode())


def sweep(output: Path, kind: Kind = BUNDLE) -> list[str]:
    """Clear away what killed builds of ``output`` left beside it, and tell of it, a sentence or two each.

    An output that was being replaced goes back to its place. Raises :class:`D3tomError` where a build of ``output`` is
    at work.
    """
    try:
        parent, name = _place(output)
    except (OSError, RuntimeError):
        return []  # another error's business
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent  # it was killed before it made the folders above its output
    prefix = _prefix(name)
    told = []
    for entry in sorted(_entries(parent)):
        named = _PARTIAL.fullmatch(entry.removeprefix(prefix)) if entry.startswith(prefix) else None
        if named is not None and (parent / entry).is_dir() and not (parent / entry).is_symlink():
            told += _sweep_one(parent / entry, named, parent / name, output, kind)
    return told


def _sweep_one(folder: Path, named: re.Match[str], place: Path, output: Path, kind: Kind) -> list[str]:
    lock: bool | None = None
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        lock = try_lock(descriptor)
    try:
        if lock is False:
            raise D3tomError(
                f"{output} is being built by another process, number {named['process']}, which works in {folder}. "
                "Wait for it to end, or give another folder with --output."
            )
        replaced = folder if named["replaced"] else folder / OLD_FOLDER
        told = []
        if _is_whole(replaced, kind) and _restore(replaced, place, kind):
            told.append(f"{output}, which a killed build was replacing, is back in its place.")
            if replaced == folder:
                return told
        return told + _clear(folder, named["host"] == _host() and (lock or not _entries(folder)), kind)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_whole(folder: Path, kind: Kind) -> bool:
    """Whether ``folder`` is an output of ours with every file that it lists."""
    return _is_ours(folder, kind) and all(os.path.lexists(folder / name) for name in _listed(folder, kind) or ())


def _clear(folder: Path, dead: bool | None, kind: Kind) -> list[str]:
    """Remove an abandoned folder of work if nothing else is in it; a sentence about it where it stays."""
    try:
        owner, names = folder.stat().st_uid, list(_files(folder))
        changed = max([folder.stat().st_mtime, *((folder / name).lstat().st_mtime for name in names)])
    except OSError:
        return []  # gone by now
    foreign = [name for name in names if name != LOCK_FILE and not _is_written(folder, name, kind)]
    if foreign:
        return [
            f"{folder} is named like what a killed build leaves, but holds {listing(foreign, 3)}, which no build "
            "writes: it stays as it is."
        ]
    if owner != os.geteuid():
        return [f"{folder} was left by a killed build of another user (number {owner}), who may remove it."]
    if not dead and time.time() - changed < ABANDONED_HOURS * 3600:
        return [
            f"{folder} was left by a build on another machine, or from before this one was started. A build after "
            f"{ABANDONED_HOURS} hours without a change in it removes it; do so yourself if no machine works on it."
        ]
    _remove(folder, kind)
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    return [f"{folder} {'could not be removed' if folder.exists() else 'was removed'}; a killed build had left it."]


def _is_written(folder: Path, name: str, kind: Kind = BUNDLE) -> bool:
    """Whether ``name`` in ``folder`` is a regular file with a name that builds give."""
    path = folder / name
    return kind.written.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()
