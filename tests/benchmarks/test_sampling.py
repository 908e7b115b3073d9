"""The sampling benchmark at tiny sizes: it tells a backend's steps from what the host does between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import sampling
from benchmarks.proportions import SMALL
from benchmarks.sampling import KINDS, _Watched, run, table
from d3tom_export.bundle.folder import Bundle
from tests.conftest import raw_config


def test_every_kind_is_measured(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "build", lambda *arguments: bundle.folder)
    monkeypatch.setattr(sampling, "claim", lambda: None)  # this process is the suite's
    found = run(replace(SMALL, config=raw_config()), 1, tmp_path)
    assert [row["kind"] for row in found] == list(KINDS)
    assert found[0]["ratio"]["median"] == 1
    assert all(0 < row["host_seconds"]["median"] < row["step_seconds"]["median"] for row in found)
    lines = table(found).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(KINDS)


def test_steps_are_told_from_the_rest() -> None:
    def start(*arguments: Any) -> Any:
        return SimpleNamespace(step=lambda request: request, first_token=None)

    watched = _Watched(SimpleNamespace(start=start, name="backend"))  # type: ignore[arg-type]
    assert watched.name == "backend"
    assert watched.start().step("asked") == "asked"
    assert watched.inside > 0
