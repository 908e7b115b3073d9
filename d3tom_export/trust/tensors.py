"""Safetensors files of strangers: headers within limits, judged by the safetensors library, data where they say.

A header is read into memory only after its length was looked at. The library then opens the same file: whatever it
refuses (overlaps, gaps, trailing bytes, lengths that do not follow from dtype and shape) is refused here too. Our own
reading serves to know where each tensor's bytes lie, which the library does not tell.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from d3tom_export.errors import D3tomError, printable
from d3tom_export.trust.documents import parse_json
from d3tom_export.trust.files import open_file

LONGEST_HEADER = 100_000_000
"""Bytes that the safetensors library reads of a header at most."""

_MOST_BYTES = 16 << 20
"""Bytes of a header that are read here. A tensor's entry takes 0.1 kB, an 8B model's header 80 kB; parsed, this much
takes at most half a GiB, ten times as much as the text."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, dtype name as safetensors spells it, shape, and byte range in the file."""

    file: Path
    """By the name that its folder has for it."""
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    source: Path
    """The regular file that ``file`` leads to: what is opened, and linked."""
    file_bytes: int
    """Size of the file when its header was read."""
    name: str
    """By which its file has it."""


def read_header(path: Path, source: Path | None = None) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name, without reading their data.

    ``source`` is the regular file that ``path`` leads to, where a folder's name was looked up. Raises
    :class:`D3tomError` where the file is missing, is none that safetensors reads, has a header beyond
    :data:`_MOST_BYTES`, or is shorter than its header promises.
    """
    source = path if source is None else source
    try:
        with open_file(source) as file:
            size = os.fstat(file.fileno()).st_size
            text = _header_text(path, file, size)
    except OSError as error:
        raise D3tomError(f"{path} cannot be read: {error.strerror}. Fetch the file again.") from None
    start = 8 + len(text)
    try:
        header = parse_json(text)
        header.pop("__metadata__", None)
        tensors = {}
        needed = start
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            numbers = (begin, end, *shape)
            if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError(f"{printable(name, 80)} has {printable(repr(entry), 120)}")
            tensors[name] = StoredTensor(path, dtype, shape, start + begin, end - begin, source, size, name)
            needed = max(needed, start + end)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise D3tomError(
            f"{path} has a safetensors header that makes no sense ({printable(str(error) or repr(error), 300)}). "
            "Fetch the file again."
        ) from None
    if size < needed:
        raise D3tomError(
            f"{path} is truncated: its header describes {needed:,} bytes and the file has {size:,}. "
            "Fetch the file again and compare its size with the source's."
        )
    _ask_the_library(path, source)
    return tensors


def _header_text(path: Path, file: BinaryIO, size: int) -> bytes:
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > size - 8:
        raise D3tomError(f"{path} is truncated or not a safetensors file: its header does not fit into it.")
    if length > _MOST_BYTES:
        known = f", safetensors itself reads {LONGEST_HEADER:,}" if length > LONGEST_HEADER else ""
        raise D3tomError(
            f"{path} has a header of {length:,} bytes, at most {_MOST_BYTES:,} are read{known}. It is not a "
            "safetensors file of a model; fetch it again."
        )
    text = file.read(length)
    if len(text) < length:
        raise D3tomError(f"{path} is truncated: it became shorter while its header was read. Fetch the file again.")
    return text


def _ask_the_library(path: Path, source: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise D3tomError(
            f"{path} has a safetensors header that the safetensors library refuses: {printable(str(error), 300)}. "
            "Fetch the file again."
        ) from None


def open_stored(tensor: StoredTensor) -> BinaryIO:
    """Open a tensor's file for reading, if it still is the one whose header was read.

    Raises :class:`D3tomError` where it is gone, is no regular file any more or has another size.
    """
    file = open_file(tensor.source)
    size = os.fstat(file.fileno()).st_size
    if size != tensor.file_bytes:
        file.close()
        raise D3tomError(
            f"{tensor.file} was changed while it was in use: it had {tensor.file_bytes:,} bytes and has {size:,}. "
            "Run the command again once nothing writes to it."
        )
    return file


def check_unchanged(tensors: Iterable[StoredTensor]) -> None:
    """Hold the files of ``tensors`` against what their headers said, each once (:func:`open_stored`)."""
    for tensor in {tensor.source: tensor for tensor in tensors}.values():
        open_stored(tensor).close()
