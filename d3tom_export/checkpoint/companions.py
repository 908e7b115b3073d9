"""Files beside its weights that a bundle takes over from a checkpoint: a list, with a limit on size for each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d3tom_export.config import CONFIG_FILE, TOKENIZER_FILE
from d3tom_export.errors import D3tomError
from d3tom_export.prompt.samples import SAMPLES_FILE
from d3tom_export.trust.documents import MOST_BYTES, parse_json
from d3tom_export.trust.files import copy_file, find_inside, is_there, read_bytes, write_file

JSON_FILES: Mapping[str, int] = {
    CONFIG_FILE: MOST_BYTES,
    "generation_config.json": MOST_BYTES,
    "preprocessor_config.json": MOST_BYTES,
    "special_tokens_map.json": MOST_BYTES,
    "tokenizer_config.json": MOST_BYTES,
}
"""Small documents, by the most bytes of each. They must parse, and the bytes that were parsed are those that are
written."""

OPAQUE_FILES: Mapping[str, int] = {TOKENIZER_FILE: 128 << 20, SAMPLES_FILE: 1 << 30}
"""Files that have readers of their own, by the most bytes of each: a vocabulary of 256,000 takes 34 MB, and the bundled
model's 300 pictures 2 MB."""

COPIED_FILES = (*JSON_FILES, *OPAQUE_FILES)
"""Files of a checkpoint that a bundle takes along, where they exist. None else, however it is called or linked."""


def check_companions(folder: Path) -> None:
    """Refuse a checkpoint with a file that a bundle would take over and cannot: before any work.

    Raises :class:`D3tomError` where one is no regular file inside the folder, is too long, or does not parse.
    """
    for _name, _content in _documents(folder):
        pass  # each was looked at on its way
    for _name, _path in _others(folder):
        pass


def copy_companions(folder: Path, target: Path, changed: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Copy the files of :data:`COPIED_FILES` that ``folder`` has into ``target``, which has none of them yet.

    ``changed`` has keys for some documents, by the file's name, that take the place of their own. Raises
    :class:`D3tomError` as :func:`check_companions` does.
    """
    for name, content in _documents(folder):
        keys = (changed or {}).get(name)
        written = content if not keys else (json.dumps(parse_json(content) | dict(keys), indent=2) + "\n").encode()
        write_file(target / name, written)
    for name, path in _others(folder):
        copy_file(path, target / name)


def _documents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name, limit in JSON_FILES.items():
        if not is_there(folder, name):
            continue
        content = read_bytes(find_inside(folder, name), limit)
        try:
            parse_json(content)
        except ValueError as error:
            raise D3tomError(
                f"{folder / name} cannot be read as JSON: {error}. Fetch the file again or correct it."
            ) from None
        yield name, content


def _others(folder: Path) -> Iterator[tuple[str, Path]]:
    for name, limit in OPAQUE_FILES.items():
        if not is_there(folder, name):
            continue
        path = find_inside(folder, name)
        size = path.stat().st_size
        if size > limit:
            raise D3tomError(
                f"{folder / name} has {size:,} bytes, at most {limit:,} are taken over into a bundle. Make it smaller, "
                "or move it out of the folder."
            )
        yield name, path
