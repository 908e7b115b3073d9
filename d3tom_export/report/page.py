"""A report as one HTML file that needs nothing else: no network, no folder beside it.

Jinja2 writes it, from the optional extra ``report``, and escapes whatever a checkpoint, a question or an answer brought
along; a policy in the page allows its own script and style by their hashes, pictures in it, and nothing else.
V visual tokens.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d3tom_export.errors import D3tomError
from d3tom_export.pictures.places import TokenGrid
from d3tom_export.report import figures
from d3tom_export.report.data import Answer, Evaluation, Report, Step
from d3tom_export.report.figures import Table, duration, milliseconds, percent
from d3tom_export.report.retention import retention_figure
from d3tom_export.trust.terminal import legible

LEVELS = 10
"""Shades that attention is drawn in on a picture."""
_GAP, _STRIP = 0.35, 0.8
"""Between a picture's grid and the strip of its newlines, and that strip's width, in columns."""
_LONGEST_SIDE = 720
"""Of a picture in the page, in pixels."""
_MOST_PNG = 120_000
"""Bytes of a picture that is kept without loss."""
_FOLDER = Path(__file__).parent


def need_libraries() -> None:
    """Raise :class:`D3tomError` where Jinja2 or matplotlib cannot be imported."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise D3tomError(
            f"A report is written with Jinja2 and drawn with matplotlib, and one of them is not installed here "
            f'({error}). Install them with `pip install "d3tom-export[report]"`.'
        ) from None


def write_page(report: Report) -> bytes:
    """The whole HTML file, in UTF-8. Raises :class:`D3tomError` where a library is missing."""
    need_libraries()
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        # Not only markup is theirs to try: control characters and turns of direction stand there as their escapes.
        finalize=lambda value: legible(value) if type(value) is str else value,
    )
    environment.filters["ticked"] = _ticked
    template = environment.from_string(_asset("page.html"))
    style, script = (Markup(_asset(name)) for name in ("page.css", "page.js"))
    text = template.render(
        **_context(report),
        style=style,
        script=script,
        style_hash=Markup(_policy_hash(style)),
        script_hash=Markup(_policy_hash(script)),
    )
    return text.encode("utf-8", "replace")


def _ticked(text: str) -> str:
    """``text`` with what stands in backticks as code, all of it escaped."""
    from markupsafe import Markup, escape

    parts = legible(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part) for place, part in enumerate(parts)
    )


def _asset(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _policy_hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _context(report: Report) -> dict[str, Any]:
    from markupsafe import Markup

    def safe(drawing: figures.Drawing | None) -> dict[str, Any] | None:
        """A figure for the template: matplotlib has escaped what is in its text."""
        if drawing is None:
            return None
        return {"svg": Markup(drawing.svg), "name": drawing.name, "alt": drawing.alt, "table": drawing.table}

    views = [_view(answer) for answer in report.answers]
    maps = [(number, answer, figures.importance_figure(answer, f"importance-{number}"))
            for number, answer in enumerate(report.answers, 1)]  # fmt: skip
    return {
        "report": report,
        "key": _key_figures(report),
        "contents": _CONTENTS,
        "answers": views,
        "held": safe(figures.held_figure(report.answers)),
        "importance": [
            {"number": number, "question": answer.question, "drawing": safe(drawing)}
            for number, answer, drawing in maps
            if drawing is not None
        ],
        "redundancy": None
        if report.redundancy is None
        else safe(figures.redundancy_figure(report.redundancy, report.layer)),
        "reductions": None if report.reductions is None else safe(figures.reductions_figure(report.reductions)),
        "retention": None if report.settings is None else safe(retention_figure(report.settings)),
        "evaluated": [] if report.evaluation is None else _evaluated(report.evaluation),
        "time": safe(figures.time_figure(report.answers)),
        "has_stages": any(step.stages for answer in report.answers for step in answer.steps),
        "prompt_table": figures.prompt_table(report.answers),
        "parity_facts": _parity_facts(report),
        # json.dumps escapes what is not ASCII; in a script element nothing else could end it.
        "data": Markup(_script_json([view.to_json() for view in views])),
    }


_CONTENTS = [
    ("answers", "Kept tokens"),
    ("importance", "Attention"),
    ("redundancy", "Redundancy"),
    ("flops", "FLOPs"),
    ("retention", "Right answers"),
    ("time", "Time"),
    ("parity", "Parity"),
    ("built", "Built with"),
]


def _script_json(value: Any) -> str:
    """``value`` as JSON that no HTML parser sees the end of its element in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _key_figures(report: Report) -> list[tuple[str, str, str]]:
    """The few numbers that stand at the top: what, how much, and of what."""
    answers = report.answers
    seen = [answer for answer in answers if answer.visual_tokens]
    found = []
    if seen:
        mean = sum(answer.mean_kept for answer in seen) / len(seen)
        tokens = sorted({answer.visual_tokens for answer in seen})
        of = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
        found.append(("visual tokens kept", percent(mean, 1), f"of {of}, mean over steps"))
        saved = 1 - sum(answer.work.total for answer in seen) / sum(answer.work.unmerged for answer in seen)
        found.append(("FLOPs saved", percent(saved, 1), "against the same steps unmerged"))
    seconds = sum(answer.prefill_seconds + answer.denoise_seconds for answer in answers) / len(answers)
    steps = sum(len(answer.steps) for answer in answers) / len(answers)
    found.append(("an answer takes", duration(seconds), f"{steps:.3g} steps, mean"))
    if report.parity is not None:
        error = report.parity.get("max_abs_logit_error")
        told = "" if error is None else f"largest logit difference {error:.1e}"
        found.append(("parity with PyTorch", "passed" if report.parity["passed"] else "failed", told))
    return found


def _evaluated(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What was evaluated, as names and values."""
    on = ", ".join(each for each in (evaluation.backend, evaluation.precision) if each)
    facts = [
        ("model", f"{evaluation.model or figures.NONE}{f' on {on}' if on else ''}"),
        ("data", evaluation.data or figures.NONE),
        ("questions", figures.NONE if evaluation.questions is None else f"{evaluation.questions:,}"),
        ("metric", "ANLS" if evaluation.metric == "anls" else "exact match"),
    ]
    return facts + ([] if evaluation.match is None else [("compared is", evaluation.match)])


def _parity_facts(report: Report) -> list[tuple[str, str]]:
    """The lines of the validation as names and values."""
    facts = []
    for line in report.parity_lines:
        name, _, told = line.strip().partition("  ")
        facts.append((name, told.strip()) if told else ("backend", line.split(": ", 1)[-1]))
    return facts


@dataclass(frozen=True)
class _Grid:
    """A grid of visual tokens as the page draws it; lengths in columns and rows."""

    view: str
    first: int
    rows: int
    columns: int
    newlines: list[int]
    left: float
    top: float
    width: float
    height: float
    gap: float
    strip: float
    stretch: float
    """How high a row is, in widths of a column."""
    box_width: float
    box_height: float
    name: str
    caption: str
    label: str
    kept: str
    veiled: str
    """Outlines of the cells that are kept at the step that is shown first, and of the others."""


@dataclass(frozen=True)
class _View:
    """An answer as the page shows it."""

    answer: Answer
    picture: str
    """A data URL; empty without a picture."""
    grids: list[_Grid]
    shown: Step
    """The step that is shown first."""
    has_importance: bool
    table: Table

    @property
    def shown_status(self) -> str:
        return _status(self.shown, self.answer)

    @property
    def shown_value(self) -> str:
        return _value(self.shown, self.answer)

    @property
    def shown_words(self) -> str:
        return _words(self.shown)

    def to_json(self) -> dict[str, Any]:
        """What the page's script knows of it."""
        grids = [asdict(grid) for grid in self.grids]
        wanted = ("first", "rows", "columns", "newlines", "gap", "strip", "name")
        return {
            "levels": LEVELS,
            "grids": [{name: grid[name] for name in wanted} for grid in grids],
            "steps": [
                {
                    "keep": step.keep,
                    "kept": step.kept,
                    "levels": None if step.importance is None else _levels(step.importance),
                    "status": _status(step, self.answer),
                    "value": _value(step, self.answer),
                    "words": _words(step),
                    "pieces": [list(piece) for piece in step.pieces],
                }
                for step in self.answer.steps
            ],
        }


def _levels(importance: NDArray[np.float32]) -> str:
    """A digit for each of the (V,) scores: its share of the largest, in :data:`LEVELS` shades."""
    largest = float(importance.max(initial=0.0))
    if not largest > 0:
        return "0" * len(importance)
    shades = np.clip(importance / largest, 0.0, 1.0) * (LEVELS - 1)
    return "".join(map(str, np.rint(shades).astype(int)))


def _status(step: Step, answer: Answer) -> str:
    """Where the slider is, in words."""
    where = f"Step {step.number} of {len(answer.steps)}"
    if not answer.visual_tokens:
        return f"{where}."
    if step.kept is None:
        why = "nothing is committed yet, so nobody decides" if step.number == 1 else "nothing is merged"
        return f"{where}: all {step.visual_tokens:,} visual tokens are seen ({why})."
    share = percent(step.keep / step.visual_tokens, 1)
    return f"{where}: {step.keep:,} of {step.visual_tokens:,} visual tokens are kept ({share})."


def _words(step: Step) -> str:
    """The answer so far for who hears it: its masks counted, not drawn."""
    masks = sum(len(piece.text) for piece in step.pieces if piece.style == "mask")
    said = " ".join("".join(piece.text for piece in step.pieces if piece.style != "mask").split()) or "nothing"
    return said if not masks else f"{said}, and {masks} mask{'s' if masks > 1 else ''}"


def _value(step: Step, answer: Answer) -> str:
    """What the slider tells of a step."""
    return f"{_status(step, answer)} The answer so far: {_words(step)}"


def _view(answer: Answer) -> _View:
    shown = answer.steps[len(answer.steps) // 2]
    heard = any(step.importance is not None for step in answer.steps)
    head = ["step", "kept", "of all", *(["attention on them"] if heard else []), "committed", "ms", "answer so far"]
    rows = [
        [
            str(step.number),
            f"{step.keep:,}",
            percent(step.keep / step.visual_tokens if step.visual_tokens else None, 1),
            *([percent(step.held_importance, 1)] if heard else []),
            str(step.committed),
            milliseconds(step.seconds),
            step.text,
        ]
        for step in answer.steps
    ]
    table = Table(f"Every step of the answer to “{answer.question}”", head, rows)
    grids = [_drawn_grid(grid, answer, shown) for grid in answer.grids]
    return _View(answer, _data_url(answer.picture), grids, shown, heard, table)


def _drawn_grid(grid: TokenGrid, answer: Answer, shown: Step) -> _Grid:
    assert answer.picture is not None
    stretch = (answer.picture.height / grid.height) / (answer.picture.width / grid.width)
    cells = [(grid.token(row, column), float(column), row, 1.0) for row in range(grid.rows)
             for column in range(grid.columns)]  # fmt: skip
    cells += [(grid.token(row, grid.columns), grid.columns + _GAP, row, _STRIP) for row in grid.newlines]
    kept = None if shown.kept is None else set(shown.kept)
    there = [cell for cell in cells if kept is not None and cell[0] in kept]
    gone = [cell for cell in cells if kept is not None and cell[0] not in kept]
    count = len(there) if kept is not None else len(cells)
    name = "The whole picture in one view" if grid.view == "whole" else "The picture in tiles"
    closed = f" and {len(grid.newlines)} that close its rows" if grid.newlines else ""
    return _Grid(
        view=grid.view,
        first=grid.first,
        rows=grid.rows,
        columns=grid.columns,
        newlines=list(grid.newlines),
        left=round(grid.left, 4),
        top=round(grid.top, 4),
        width=round(grid.width, 4),
        height=round(grid.height, 4),
        gap=_GAP,
        strip=_STRIP,
        stretch=round(stretch, 4),
        box_width=round(grid.columns + (_GAP + _STRIP if grid.newlines else 0.0), 4),
        box_height=round(grid.rows * stretch, 4),
        name=name,
        caption=f"{name}: {grid.columns} × {grid.rows} tokens{closed}",  # noqa: RUF001
        label=f"{name}, step {shown.number}: {count} of {len(cells)} tokens kept",
        kept=_outline(there),
        veiled=_outline(gone),
    )


def _outline(cells: Sequence[tuple[int, float, int, float]]) -> str:
    """The path around every cell: (token, x, y, width) each."""
    return "".join(f"M{x:g} {y}h{width:g}v1h-{width:g}z" for _, x, y, width in cells)


def _data_url(picture: Image.Image | None) -> str:
    """``picture`` as the page holds it: no larger than a screen shows it, without loss where that is small."""
    if picture is None:
        return ""
    smaller = picture.convert("RGB")
    smaller.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file = io.BytesIO()
    smaller.save(file, "PNG", optimize=True)
    kind = "png"
    if file.tell() > _MOST_PNG:
        file, kind = io.BytesIO(), "jpeg"
        smaller.save(file, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
