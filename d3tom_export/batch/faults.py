"""Why a row has no answer: its own fault, which stays, or something unexpected, which may be gone when asked again."""

from __future__ import annotations

import errno
from typing import Any

from d3tom_export.errors import D3tomError, UnexpectedError, printable

UNEXPECTED = "unexpected"
"""A field beside ``error`` of what became of a row: nothing says that the row is at fault. Not written."""

_LASTING = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EINVAL,
    None,  # Pillow's own, of a file that is damaged
}
"""What a system says of a file that is not there, or not for us: asking again does not help."""


def is_own(error: BaseException) -> bool:
    """Whether ``error`` is of the row that it was raised for: bad JSON, no picture, a prompt that is too long."""
    if not isinstance(error, D3tomError):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (UnexpectedError, MemoryError)):
            return False
        if isinstance(cause, OSError) and cause.errno not in _LASTING:
            return False
        cause = cause.__cause__ or cause.__context__  # also where a message was raised "from None"
    return True


def failure(identity: str, error: BaseException) -> dict[str, Any]:
    """What became of the row of this id, for which ``error`` was raised."""
    text = str(error) if isinstance(error, D3tomError) else f"Unexpected {type(error).__name__}: {error}"
    found = {"id": identity, "error": printable(text)}
    return found if is_own(error) else found | {UNEXPECTED: True}
