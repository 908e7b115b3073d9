"""What a report says, as data: no HTML, no figure. ``to_json`` is what ``report --json`` writes.

V visual tokens, K kept, N layers. Imports no framework but NumPy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d3tom_export.cost.flops import StepMerge
from d3tom_export.pictures.places import TokenGrid
from d3tom_export.prompt.pieces import Piece


@dataclass(frozen=True)
class Step:
    """One step of an answer, as it ended."""

    number: int
    """Counted from 1, over all blocks."""
    merged: bool
    kept: list[int] | None
    """The K of the V visual tokens that were kept, ascending; None where nothing merged."""
    visual_tokens: int
    """V."""
    committed: int
    """Tokens of the answer that this step committed."""
    pieces: list[Piece]
    """The answer so far, its masks as blocks."""
    seconds: float
    stages: dict[str, float]
    """Seconds by stage, where the backend tells."""
    importance: NDArray[np.float32] | None = None
    """(V,) attention of the deciders at l*, summed over them; None where nothing decided, or nobody was asked."""

    @property
    def keep(self) -> int:
        """K, or V where nothing merged."""
        return self.visual_tokens if self.kept is None else len(self.kept)

    @property
    def held_importance(self) -> float | None:
        """The share of the importance that the kept tokens have."""
        if self.importance is None or self.kept is None:
            return None
        total = float(self.importance.sum(dtype=np.float64))
        return float(self.importance[self.kept].sum(dtype=np.float64)) / total if total > 0 else None

    @property
    def text(self) -> str:
        """The answer so far, as it is drawn."""
        return "".join(piece.text for piece in self.pieces)

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.number,
            "merged": self.merged,
            "keep": self.keep,
            "kept": self.kept,
            "committed": self.committed,
            "answer": self.text,
            "seconds": round(self.seconds, 6),
            "stages": {name: round(seconds, 6) for name, seconds in self.stages.items()},
            "held_importance": _rounded(self.held_importance),
            "importance": None if self.importance is None else [_digits(float(each)) for each in self.importance],
        }


@dataclass(frozen=True)
class Work:
    """FLOPs of an answer's matrix products, by stage, and of the same steps unmerged."""

    stages: dict[str, int]
    unmerged: int

    @property
    def total(self) -> int:
        return sum(self.stages.values())

    @property
    def saved(self) -> float:
        """The share of the unmerged answer's that merging saved."""
        return 1 - self.total / self.unmerged

    def to_json(self) -> dict[str, Any]:
        return {"stages": self.stages, "total": self.total, "unmerged": self.unmerged, "saved": _rounded(self.saved)}


@dataclass(frozen=True)
class Redundancy:
    """How alike visual tokens are, over layers and some of an answer's steps."""

    steps: list[str]
    """Which steps, in words."""
    similarities: NDArray[np.float32]
    """(steps, N, tokens): of each visual token, of all pictures, the cosine similarity to the one it is most alike."""

    def quantile(self, share: float) -> NDArray[np.float64]:
        """(steps, N) what so large a share of the tokens has at most."""
        return np.quantile(self.similarities.astype(np.float64), share, axis=-1)

    def above(self, similarity: float) -> NDArray[np.float64]:
        """(steps, N) the share of tokens that have a more similar one than that."""
        return (self.similarities > similarity).mean(axis=-1)

    def to_json(self) -> dict[str, Any]:
        names = {"p10": 0.1, "median": 0.5, "p90": 0.9}
        quantiles = {name: [[_rounded(x) for x in row] for row in self.quantile(q)] for name, q in names.items()}
        return {"steps": self.steps, "tokens": self.similarities.shape[-1], **quantiles}


@dataclass(frozen=True)
class Answer:
    """What became of one question."""

    question: str
    picture_name: str
    picture: Image.Image | None
    grids: list[TokenGrid]
    """Where the visual tokens lie; none without a picture."""
    text: str
    right: str | None
    """The right answer, where it is known."""
    prompt_tokens: int
    visual_tokens: int
    prompt_seconds: float
    """For encoding the picture and embedding the question."""
    prefill_seconds: float
    """For what comes before the first step: the prefill, with a KV cache."""
    prompt_stages: dict[str, float]
    """Seconds by stage before the first step, where the backend tells."""
    steps: list[Step]
    merges: list[StepMerge]
    """What each step merged, for counting."""
    work: Work

    @property
    def denoise_seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def mean_kept(self) -> float:
        """The mean share of visual tokens over the steps; 1 without any."""
        return sum(step.keep for step in self.steps) / max(len(self.steps) * self.visual_tokens, 1)

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds by stage over the prompt and all steps, in the order of a run."""
        totals: dict[str, float] = {}
        for stages in (self.prompt_stages, *(step.stages for step in self.steps)):
            for name, seconds in stages.items():
                totals[name] = totals.get(name, 0.0) + seconds
        return totals

    def to_json(self) -> dict[str, Any]:
        seconds = {"prompt": self.prompt_seconds, "prefill": self.prefill_seconds, "denoise": self.denoise_seconds}
        return {
            "question": self.question,
            "picture": self.picture_name,
            "answer": self.text,
            "right_answer": self.right,
            "prompt_tokens": self.prompt_tokens,
            "visual_tokens": self.visual_tokens,
            "mean_kept": _rounded(self.mean_kept),
            "grids": [asdict(grid) for grid in self.grids],
            "seconds": {name: round(value, 6) for name, value in seconds.items()},
            "stage_seconds": {name: round(value, 6) for name, value in self.stage_seconds.items()},
            "flops": self.work.to_json(),
            "steps": [step.to_json() for step in self.steps],
        }


@dataclass(frozen=True)
class Reductions:
    """FLOPs that merging saves without a KV cache, over l* and ratio: the paper's figure 5."""

    layers: list[int]
    ratios: list[float]
    saved: list[list[float]]
    """Shares, a row for each of ``layers`` and a column for each of ``ratios``."""
    layer: int
    ratio: float
    here: float
    """The share at the bundle's own l* and ratio."""
    sizes: str
    """Of the answer that is counted, in words."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


UNMERGED = "unmerged"
"""The policy of a setting that has none."""


@dataclass(frozen=True)
class Setting:
    """One row of ``evaluate --json``."""

    loop: str
    select: str
    """Who picks the tokens that stay, or :data:`UNMERGED`."""
    layer: int | None
    ratio: float | None
    exact_match: float
    interval: tuple[float, float]
    retention: float | None
    mean_kept: float
    """The share of visual tokens that were kept, mean over steps."""
    steps: float
    anls: float | None = None
    anls_interval: tuple[float, float] | None = None
    """Where ANLS is what was compared: then ``retention`` is of it."""
    details: tuple[tuple[str, str], ...] = ()
    """What else was set, names and values: settings of one line have all of it in common."""


@dataclass(frozen=True)
class Evaluation:
    """What rows of ``evaluate --json`` are of; None where the file does not say."""

    model: str | None = None
    """Name of the bundle's or checkpoint's folder."""
    backend: str | None = None
    precision: str | None = None
    data: str | None = None
    questions: int | None = None
    metric: Literal["exact-match", "anls"] = "exact-match"
    """What was compared."""
    match: str | None = None
    """The regular expression that found what was compared."""
    other: bool = False
    """Whether it is another model than the report's, or of none that it names."""


@dataclass(frozen=True)
class Report:
    """All of it."""

    title: str
    """The model's name, which its checkpoint chose."""
    backend: str
    loop: str
    precision: str
    merging: str
    """In words."""
    layer: int
    merges_others: bool
    """Whether tokens that are not kept join others; else they are dropped."""
    answers: list[Answer]
    reductions: Reductions | None
    built: list[tuple[str, list[tuple[str, str]]]]
    """What it was built with: groups of names and what stands behind them."""
    hashes: list[tuple[str, str]]
    """sha256 of the bundle's files, by name."""
    command: str
    redundancy: Redundancy | None = None
    settings: list[Setting] | None = None
    evaluation: Evaluation | None = None
    """What ``settings`` are of."""
    parity: dict[str, Any] | None = None
    """What ``validate --json`` writes."""
    parity_lines: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Sections that are not there, and why, with what to do."""

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "backend": self.backend,
            "loop": self.loop,
            "precision": self.precision,
            "answers": [answer.to_json() for answer in self.answers],
            "redundancy": None if self.redundancy is None else self.redundancy.to_json(),
            "reductions": None if self.reductions is None else self.reductions.to_json(),
            "settings": None if self.settings is None else [asdict(setting) for setting in self.settings],
            "evaluation": None if self.evaluation is None else asdict(self.evaluation),
            "parity": self.parity,
            "built": {group: dict(entries) for group, entries in self.built},
            "hashes": dict(self.hashes),
            "left_out": self.left_out,
        }


def _rounded(value: float | None) -> float | None:
    """``value`` to six places; None for what JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else round(float(value), 6)


def _digits(value: float) -> float:
    """``value`` to four significant digits."""
    return float(f"{value:.4g}")
