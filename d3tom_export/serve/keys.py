"""API keys: where a server has them from, and whether a request has one."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from d3tom_export.errors import D3tomError
from d3tom_export.trust.files import read_bytes

VARIABLE = "D3TOM_EXPORT_API_KEY"
_MOST_BYTES = 64 << 10
_SHORTEST = 16


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The keys in ``file``, one a line, or else the one in the environment's :data:`VARIABLE`; none where neither is.

    Neither shows in the list of processes. Raises :class:`D3tomError` for a file without keys, and for keys that can
    be guessed or that no header carries.
    """
    if file is None:
        keys, where = [os.environ.get(VARIABLE, "")], f"The variable {VARIABLE}"
        if not keys[0]:
            return ()
    else:
        where = str(file)
        try:
            keys = [line.strip() for line in read_bytes(file, _MOST_BYTES).decode("ascii").splitlines()]
        except UnicodeDecodeError:
            keys = ["\0"]
        keys = [key for key in keys if key]
        if not keys:
            raise D3tomError(f"{where} holds no key. Write one a line, {_SHORTEST} characters or more.")
    _check(keys, where)
    return tuple(keys)


def _check(keys: Sequence[str], where: str) -> None:
    for key in keys:
        if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise D3tomError(
                f"{where} holds a key that cannot serve: a key has {_SHORTEST} or more printable ASCII characters and "
                "no blank. `openssl rand -hex 24` makes one."
            )


class Keys:
    """Keys that let requests in; without any, all are let in.

    Raises :class:`D3tomError` for one text, whose characters would be keys, and for keys that can be guessed or that no
    header carries.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if isinstance(keys, (str, bytes)) or not all(isinstance(key, str) for key in keys):
            raise D3tomError("keys is no list of texts. Give every key as an element of a list, were there only one.")
        _check(keys, "The list of keys")
        self._digests = [_digest(key.encode()) for key in keys]

    def let_in(self, authorization: str) -> bool:
        """Whether the header ``Authorization`` has one of them. How long that takes does not tell what was wrong."""
        kind, _, given = authorization.partition(" ")
        digest = _digest(given.strip().encode("utf-8", "surrogateescape"))
        found = [hmac.compare_digest(digest, each) for each in self._digests]
        return not found or (kind.lower() == "bearer" and any(found))


def _digest(key: bytes) -> bytes:
    """Of one length, whatever the key's."""
    return hashlib.sha256(key).digest()
