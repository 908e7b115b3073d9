"""Rows to ask the synthetic model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.batch.answering import Job
from d3tom_export.bundle.folder import Bundle
from tests.conftest import picture

MakeJob = Callable[..., Job]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve rows, of which four cannot be answered, in a folder with their pictures."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        picture(40 + 10 * number, 40, number).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    rows: list[Any] = [{"image": f"{at % 3}.png", "question": f"What is {at}?", "id": f"q{at}"} for at in range(8)]
    rows.insert(1, {"image": "broken.png", "question": "What?"})
    rows.insert(4, {"image": "absent.png", "question": "What?"})
    rows.insert(6, {"image": "../0.png", "prompt": "What?"})
    lines = [json.dumps(row) for row in rows]
    lines.insert(9, "{nonsense")
    (folder / "questions.jsonl").write_text("\n".join([*lines[:5], "", *lines[5:]]) + "\n")
    return folder


@pytest.fixture
def make_job(bundle: Bundle, data: Path) -> MakeJob:
    """A job over ``data``."""

    def make(**changes: Any) -> Job:
        given: dict[str, Any] = {
            "bundle": bundle.folder,
            "opening": {"device": "cpu", "kv_cache": False},
            "settings": {"gen_length": 4},
            "data": data,
            "prompt": None,
            "batch": 2,
        }
        return Job(**given | changes)

    return make
