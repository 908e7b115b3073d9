"""The results of ``evaluate --json FILE``, which a stranger may have written. Imports no framework."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from d3tom_export.errors import D3tomError, printable
from d3tom_export.report.data import UNMERGED, Setting
from d3tom_export.trust.documents import read_json

_Share = Annotated[float, Meta(ge=0.0, le=1.0)]
_Name = Annotated[str, Meta(max_length=100)]
_MOST_ROWS = 2000


class _Row(msgspec.Struct):
    """What is read of a row; it may have more."""

    loop: _Name
    exact_match: _Share
    interval: tuple[_Share, _Share]
    mean_kept: _Share
    steps: Annotated[float, Meta(ge=0.0, le=1e9)]
    select: _Name | None = None
    layer: Annotated[int, Meta(ge=0, le=100_000)] | None = None
    ratio: _Share | None = None
    retention: Annotated[float, Meta(ge=0.0, le=1e6)] | None = None


def read_settings(path: Path) -> list[Setting]:
    """One setting for each row of an evaluation's results. Raises :class:`D3tomError` for a file of another kind."""
    raw = read_json(path)
    rows: Any = raw.get("rows")
    if not isinstance(rows, list) or not rows or len(rows) > _MOST_ROWS:
        found = "none" if not isinstance(rows, list) else str(len(rows))
        raise D3tomError(
            f"{path} is no result of an evaluation: expected 1 to {_MOST_ROWS} settings under `rows`, found {found}. "
            "Write it with `d3tom-export evaluate BUNDLE --json FILE`."
        )
    try:
        read = [msgspec.convert(row, _Row) for row in rows]
    except msgspec.ValidationError as error:
        raise D3tomError(
            f"{path} is no result of an evaluation: {printable(str(error), 300)}. Write it with `d3tom-export evaluate "
            "BUNDLE --json FILE`."
        ) from None
    return [
        Setting(
            row.loop,
            row.select or UNMERGED,
            row.layer,
            row.ratio,
            row.exact_match,
            row.interval,
            row.retention,
            row.mean_kept,
            row.steps,
        )
        for row in read
    ]
