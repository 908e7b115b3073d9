"""A report of the synthetic bundle, written once for all tests, and one made up of whatever is hostile."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.cost.flops import StepMerge
from d3tom_export.pictures.places import TokenGrid
from d3tom_export.prompt.pieces import Piece
from d3tom_export.report.data import Answer, Reductions, Redundancy, Report, Setting, Step, Work
from tests.conftest import Invoke, Shared, picture

HOSTILE = "</script></style><img src=x onerror=alert(1)>&amp;\"'{{7*7}}$x^$`\x07\u202e"
"""What a checkpoint, a question or an answer may say."""
QUESTION = f"What is it? {HOSTILE}"


@dataclass(frozen=True)
class Written:
    """A page, and the same as data."""

    path: Path
    html: str
    data: dict[str, Any]


def evaluation_rows() -> list[dict[str, Any]]:
    """Rows as `evaluate --json` has them, with more fields than are read."""
    return [
        {
            "loop": "uncached", "select": select, "layer": 1, "ratio": ratio, "exact_match": right,
            "interval": [right - 0.05, right + 0.02], "retention": right / 0.95, "mean_kept": 1 - ratio, "steps": 8,
            "flops": 12,
        }
        for select in ("decider", f"random{HOSTILE}")
        for ratio, right in ((0.0, 0.95), (0.5, 0.9), (0.9, 0.625))
    ]  # fmt: skip


@pytest.fixture(scope="session")
def written(bundle: Bundle, shared: Shared, invoke: Invoke) -> Written:
    """The page of two pictures, of which one is wider than high, with an evaluation and parity."""

    def fill(folder: Path) -> None:
        picture(70, 50).save(folder / "wide.png")
        picture(40, 60, seed=1).save(folder / "high.png")
        surer = [row | {"commit": "threshold 0.9", "mean_kept": 0.9 * row["mean_kept"]} for row in evaluation_rows()]
        rows = [row | {"commit": "plan"} for row in evaluation_rows()] + surer
        head = {"model": f"bundles/other {HOSTILE}", "data": "docvqa", "questions": 1234, "metric": "exact-match"}
        (folder / "evaluation.json").write_text(json.dumps({**head, "rows": rows}))
        result = invoke(
            "report", bundle.folder, "--output", folder / "report.html", "--json", folder / "report.json",
            "--image", folder / "wide.png", "--prompt", QUESTION,
            "--image", folder / "high.png", "--prompt", "And this?",
            "--no-kv-cache", "--no-early-exit", "--parity-samples", 1, "--evaluation", folder / "evaluation.json",
        )  # fmt: skip
        assert result.exit_code == 0, result.output

    folder = shared("report", fill)
    page = folder / "report.html"
    return Written(page, page.read_text(encoding="utf-8"), json.loads((folder / "report.json").read_text()))


@pytest.fixture(scope="session")
def made_up() -> Report:
    """A report of no run, hostile in every text."""
    grid = TokenGrid("tiles", 0, 2, 3, (0, 1), 0.0, 0.0, 3.0, 2.0)
    scores = np.arange(8, dtype=np.float32)
    steps = [
        Step(1, False, None, 8, 1, [Piece(HOSTILE, "new"), Piece("░░", "mask")], 0.25, {"front": 0.1, "back": 0.1}),
        Step(2, True, [1, 6], 8, 2, [Piece(HOSTILE, "said")], 0.125, {"front": 0.05, HOSTILE: 0.05}, scores),
    ]
    work = Work({"front": 40, "back": 20}, 100)
    answer = Answer(
        HOSTILE, HOSTILE, picture(30, 20), [grid], HOSTILE, HOSTILE, 20, 8, 0.5, 0.25, {"vision": 0.4}, steps,
        [StepMerge(None), StepMerge(2)], work,
    )  # fmt: skip
    alike = np.linspace(0.5, 1, 24, dtype=np.float32).reshape(1, 3, 8)
    setting = Setting(HOSTILE, HOSTILE, None, None, 0.5, (0.25, 0.75), None, 0.5, 4)
    return Report(
        title=HOSTILE, backend=HOSTILE, loop="uncached", precision="fp32", merging=HOSTILE, layer=1,
        merges_others=True, answers=[answer],
        reductions=Reductions([0, 1, 2], [0.5, 0.7, 0.9], [[0.5, 0.6, 0.7], [0.3, 0.4, 0.5], [0.0, 0.1, 0.2]], 1,
                              0.7, 0.4, HOSTILE),
        built=[(HOSTILE, [(HOSTILE, HOSTILE)])], hashes=[(HOSTILE, HOSTILE)], command=HOSTILE,
        redundancy=Redundancy([HOSTILE], alike), settings=[setting],
        parity={"passed": False, "max_abs_logit_error": None}, parity_lines=[f"FAILED: {HOSTILE}"],
        left_out={"importance": HOSTILE},
    )  # fmt: skip
