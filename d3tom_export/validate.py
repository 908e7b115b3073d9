"""Parity: two runs of the loop, compared step by step; and a run against a recorded one.

Fails closed: a missing output, a NaN, a step too few or a changed shape is a failure. Exact ties and near-ties are
counted apart from true flips, and the report names the smallest logit tolerance that would have passed.
Imports no framework: the caller brings the backends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import GenerationConfig, MergeConfig, ModelConfig
from d3tom_export.denoise import StepRecord, denoise
from d3tom_export.pipeline import Backend, Prompt, Reader
from d3tom_export.progress import Progress, no_progress
from d3tom_export.recorded import RecordedRun
from d3tom_export.samples import Sample, TokenSample

ORACLE_TOLERANCE = 2e-4
"""Largest logit difference, absolute, of the float32 oracle to a recorded run (design.md, "Numbers")."""

BACKEND_TOLERANCE = 1e-3
"""Largest logit difference, absolute, of a float32 backend to the oracle or to a recorded run."""

NEAR_TIE = 1e-5
"""A decision whose two candidates differ by less, relative to the larger, is a near-tie: float32 sums in another
order may turn it."""


@dataclass(frozen=True)
class ExpectedStep:
    """What a step ought to give. Arrays without a batch axis: one answer at a time."""

    tokens: NDArray[np.int64]
    transfer: NDArray[np.bool_]
    logits: NDArray[np.float32]
    kept: NDArray[np.int64] | None
    scores: NDArray[np.float32] | None = None


@dataclass
class Report:
    """The outcome of a validation; ``to_json`` is what ``validate --json`` writes."""

    backend: str
    logit_tolerance: float
    samples: int = 0
    steps: int = 0
    tokens_identical: bool = True
    transfers_identical: bool = True
    kept_identical: bool = True
    max_abs_logit_error: float = 0.0
    """Over the steps of each answer up to its first departure; NaN or infinity where a logit was not finite."""
    near_ties: int = 0
    true_flips: int = 0
    problems: list[str] = field(default_factory=list)
    """What departed, the first of each answer."""
    exact_match: float | None = None
    exact_match_reference: float | None = None

    @property
    def passed(self) -> bool:
        return (
            self.steps > 0
            and self.tokens_identical
            and self.transfers_identical
            and self.kept_identical
            and bool(self.max_abs_logit_error <= self.logit_tolerance)
            and not self.problems
        )

    def to_json(self) -> dict[str, Any]:
        error = self.max_abs_logit_error
        # JSON knows no NaN or infinity; null, and a failed report, stand for them.
        return {"passed": self.passed, **asdict(self), "max_abs_logit_error": error if np.isfinite(error) else None}

    def _flip(self, where: str, what: str, gap: float | None) -> None:
        """Note a decision that went the other way, by how much it was open to doubt."""
        near = gap is not None and gap <= NEAR_TIE
        self.near_ties += near
        self.true_flips += not near
        doubt = "" if gap is None else f", relative gap of the two candidates {gap:.1e}"
        self.problems.append(f"{where}: {what} ({'near-tie' if near else 'true flip'}{doubt})")

    def compare_step(self, where: str, expected: ExpectedStep, record: StepRecord, row: int = 0) -> bool:
        """Compare one step; False once it departs, after which an answer's later steps no longer compare."""
        self.steps += 1
        result = record.result
        logits, kept = result.logits, result.kept
        if logits is None or logits[row].shape != expected.logits.shape:
            self.max_abs_logit_error = float("inf")
            self.problems.append(f"{where}: no logits of shape {expected.logits.shape}")
            return False
        error = float(np.abs(logits[row].astype(np.float64) - expected.logits).max())
        # max() of a NaN depends on the order of its arguments; a NaN must win.
        self.max_abs_logit_error = error if np.isnan(error) else max(self.max_abs_logit_error, error)
        if (kept is None) != (expected.kept is None) or (
            kept is not None and not np.array_equal(kept[row], expected.kept)  # type: ignore[arg-type]
        ):
            self.kept_identical = False
            gap = None
            if kept is not None and expected.kept is not None and expected.scores is not None:
                gap = _kept_gap(kept[row], expected.kept, expected.scores)
            self._flip(where, "kept tokens differ", gap)
            return False
        if not np.array_equal(record.transfer[row], expected.transfer):
            self.transfers_identical = False
            self._flip(where, "other positions were committed", _confidence_gap(record, expected, row))
            self.tokens_identical &= bool(np.array_equal(record.tokens[row], expected.tokens))
            return False
        if not np.array_equal(record.tokens[row], expected.tokens):
            self.tokens_identical = False
            self._flip(where, "other tokens were committed", _token_gap(record, expected, row))
            return False
        return True


def _relative_gap(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def _kept_gap(found: NDArray[np.int64], expected: NDArray[np.int64], scores: NDArray[np.float32]) -> float:
    """Largest relative difference of score between tokens that changed places across the cut."""
    gained, lost = np.setdiff1d(found, expected), np.setdiff1d(expected, found)
    if len(gained) != len(lost) or not len(gained):
        return float("inf")
    return _relative_gap(float(scores[lost].max()), float(scores[gained].min()))


def _confidence_gap(record: StepRecord, expected: ExpectedStep, row: int) -> float:
    gained = record.transfer[row] & ~expected.transfer
    lost = expected.transfer & ~record.transfer[row]
    if not gained.any() or not lost.any():
        return float("inf")
    confidence = record.result.confidence[row]
    return _relative_gap(float(confidence[gained].min()), float(confidence[lost].max()))


def _token_gap(record: StepRecord, expected: ExpectedStep, row: int) -> float:
    position = int(np.flatnonzero(record.tokens[row] != expected.tokens)[0])
    logits = expected.logits[position]
    return _relative_gap(float(logits[record.tokens[row][position]]), float(logits[expected.tokens[position]]))


def expected_from_recording(run: RecordedRun) -> Iterator[ExpectedStep]:
    """The steps of a recorded run; a step merges from the second on, where the run merges at all."""
    merges = iter(enumerate(run.kept))
    for step in range(len(run.tokens)):
        index, kept = next(merges, (None, None)) if step else (None, None)
        scores = run.trace.get(f"merge.{index}.scores")
        yield ExpectedStep(
            run.tokens[step],
            run.transfer[step],
            run.logits[step],
            kept,
            None if scores is None else scores[run.visual_positions],
        )


def expected_from_records(records: Iterable[StepRecord]) -> Iterator[ExpectedStep]:
    """The steps of a reference run of the loop (batch 1, logits asked for)."""
    for record in records:
        result = record.result
        assert result.logits is not None
        yield ExpectedStep(
            record.tokens[0],
            record.transfer[0],
            result.logits[0],
            None if result.kept is None else result.kept[0],
            None if result.scores is None else result.scores[0],
        )


def compare_runs(report: Report, where: str, expected: Iterable[ExpectedStep], records: Iterable[StepRecord]) -> None:
    """Compare a run with what was expected of it, into ``report``."""
    expected_steps, found = list(expected), list(records)
    report.samples += 1
    for index, (want, record) in enumerate(zip(expected_steps, found, strict=False)):
        if not report.compare_step(f"{where}, step {index}", want, record):
            break
    if len(expected_steps) != len(found):
        report.problems.append(f"{where}: {len(found)} steps ran, expected {len(expected_steps)}")


def validate_recorded(run: RecordedRun, backend: Backend, mask_token_id: int, tolerance: float) -> Report:
    """Run a recorded case on ``backend`` and compare every step."""
    report = Report(backend.name, tolerance)
    records = denoise(
        backend.start(run.prompt_embeddings, run.visual_positions),
        batch=1,
        visual_tokens=len(run.visual_positions),
        mask_token_id=mask_token_id,
        generation=run.generation,
        merge=run.merge,
        logits=True,
    )
    compare_runs(report, run.name, expected_from_recording(run), records)
    return report


def _embed(
    backend: Backend, sample: Sample | TokenSample, reader: Reader | None, generation: GenerationConfig
) -> Prompt:
    if isinstance(sample, TokenSample):
        return Prompt(backend.embed_tokens(sample.token_ids), sample.visual_positions)
    assert reader is not None, "a sample with a question needs a tokenizer"
    pictures = [] if sample.picture is None else [sample.picture]
    return reader.read(backend, sample.question, pictures, generation)


def validate_backend(
    oracle: Backend,
    backend: Backend,
    config: ModelConfig,
    reader: Reader | None,
    samples: Sequence[Sample | TokenSample],
    generation: GenerationConfig,
    merge: MergeConfig,
    progress: Progress = no_progress,
) -> Report:
    """Run every sample on both backends, each from its own embedding of the picture, and compare every step.

    ``reader`` may be None where all samples are tokens.
    """
    report = Report(backend.name, BACKEND_TOLERANCE)
    right = right_reference = known = 0
    for index, sample in enumerate(samples):
        progress("comparing answers with PyTorch", index, len(samples))
        runs = {}
        for role, runner in (("reference", oracle), ("candidate", backend)):
            prompt = _embed(runner, sample, reader, generation)
            runs[role] = list(
                denoise(
                    runner.start(prompt.embeddings, prompt.visual_positions),
                    batch=1,
                    visual_tokens=len(prompt.visual_positions),
                    mask_token_id=config.language.mask_token_id,
                    generation=generation,
                    merge=merge,
                    logits=True,
                )
            )
        compare_runs(report, f"sample {index}", expected_from_records(runs["reference"]), runs["candidate"])
        if reader is not None and isinstance(sample, Sample) and sample.answer is not None:
            known += 1
            right += reader.text(runs["candidate"][-1].tokens[0]) == sample.answer
            right_reference += reader.text(runs["reference"][-1].tokens[0]) == sample.answer
            report.exact_match, report.exact_match_reference = right / known, right_reference / known
    progress("answers compared", len(samples), len(samples))
    return report
