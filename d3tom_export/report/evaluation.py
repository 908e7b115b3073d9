"""The results of ``evaluate --json FILE``, which a stranger may have written. Imports no framework."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from d3tom_export.errors import D3tomError, printable
from d3tom_export.report.data import UNMERGED, Evaluation, Setting
from d3tom_export.trust.documents import read_json

_Share = Annotated[float, Meta(ge=0.0, le=1.0)]
_Name = Annotated[str, Meta(max_length=100)]
_Words = Annotated[str, Meta(max_length=1000)]
_Fields = Annotated[dict[_Name, Any], Meta(max_length=100)]
_MOST_ROWS = 2000
_LONGEST_VALUE = 40
"""Characters of a value that are shown."""
_OWN = {"layer", "ratio", "select"}
_RULE = {"commit", "threshold", "factor", "margin"}
"""Fields of a generation that the row's own ``commit`` has in words."""


class _Head(msgspec.Struct):
    """What is read of a file beside its rows."""

    model: _Words | None = None
    backend: _Words | None = None
    precision: _Words | None = None
    data: _Words | None = None
    questions: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    metric: Literal["exact-match", "anls"] = "exact-match"
    match: _Words | None = None


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
    anls: _Share | None = None
    anls_interval: tuple[_Share, _Share] | None = None
    schedule: _Name | None = None
    commit: _Name | None = None
    merge: _Fields | None = None
    generation: _Fields | None = None

    def details(self) -> Iterator[tuple[str, str]]:
        """What else it was run with, by name: all but what has a field of its own here."""
        rule = {} if self.commit is None else {"commit": self.commit}
        merge = {"schedule": self.schedule} if self.select is not None and self.schedule is not None else {}
        generation = dict(_flat(self.generation or {}))
        if "schedule" in generation:  # of how tokens are spread over steps; the merge has one, too
            generation["step_schedule"] = generation.pop("schedule")
        told = [
            (rule, ()),
            (merge, ()),
            (dict(_flat(self.merge or {})), {*_OWN, *merge}),
            (generation, _RULE if rule else ()),
        ]
        for fields, known in told:
            for name, value in fields.items():
                if name not in known:
                    yield name.replace("_", " "), value


def _flat(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values; those of objects inside, too."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, printable(value if isinstance(value, str) else json.dumps(value), _LONGEST_VALUE)


def read_evaluation(path: Path, names: Collection[str] = ()) -> tuple[Evaluation, list[Setting]]:
    """What an evaluation's results are of, and one setting for each row of them.

    ``names`` are those that the model has where it is the one of the report. Raises :class:`D3tomError` for a file of
    another kind.
    """
    raw = read_json(path)
    rows: Any = raw.get("rows")
    if not isinstance(rows, list) or not rows or len(rows) > _MOST_ROWS:
        found = "none" if not isinstance(rows, list) else str(len(rows))
        raise D3tomError(
            f"{path} is no result of an evaluation: expected 1 to {_MOST_ROWS} settings under `rows`, found {found}. "
            "Write it with `d3tom-export evaluate BUNDLE --json FILE`."
        )
    try:
        head = msgspec.convert({name: raw[name] for name in _Head.__struct_fields__ if name in raw}, _Head)
        read = [msgspec.convert(row, _Row) for row in rows]
    except msgspec.ValidationError as error:
        raise D3tomError(
            f"{path} is no result of an evaluation: {printable(str(error), 300)}. Write it with `d3tom-export evaluate "
            "BUNDLE --json FILE`."
        ) from None
    if head.metric == "anls" and any(row.anls is None for row in read):
        raise D3tomError(
            f"{path} is no result of an evaluation: its metric is ANLS, and not every row has one. Write it with "
            "`d3tom-export evaluate BUNDLE --json FILE`."
        )
    # The folder alone: where it lay is nobody's business.
    model, data = (None if name is None else Path(name).name or name for name in (head.model, head.data))
    evaluation = Evaluation(
        model, head.backend, head.precision, data, head.questions, head.metric, head.match, model not in names
    )
    return evaluation, [
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
            row.anls if head.metric == "anls" else None,
            row.anls_interval if head.metric == "anls" else None,
            tuple(row.details()),
        )
        for row in read
    ]
