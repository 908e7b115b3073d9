"""Parity fails closed: each kind of departure is seen, named and counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.errors import D3tomError
from d3tom_export.loop.denoise import Floats, Ints, StepRecord, StepRequest, StepResult, denoise
from d3tom_export.parity.recorded import RecordedRun, load_recorded_run
from d3tom_export.parity.replay import expected_from_recording, validate_recorded
from d3tom_export.parity.validate import ORACLE_TOLERANCE, Report, compare_runs, expected_from_records
from tests.conftest import OWN_GOLDEN

CASE = OWN_GOLDEN / "plain-adaptive"


@pytest.fixture(scope="module")
def run() -> RecordedRun:
    return load_recorded_run(CASE)


@pytest.fixture(scope="module")
def backend(run: RecordedRun) -> PyTorchBackend:
    return PyTorchBackend(load_model(open_checkpoint(CASE)), run.merge)


@pytest.fixture(scope="module")
def records(run: RecordedRun, backend: PyTorchBackend) -> list[StepRecord]:
    session = backend.start(run.prompt_embeddings, run.visual_positions)
    loop = denoise(
        session,
        batch=1,
        visual_tokens=len(run.visual_positions),
        mask_token_id=199,
        generation=run.generation,
        merge=run.merge,
        logits=True,
    )
    return list(loop)


def _report(run: RecordedRun, records: list[StepRecord]) -> Report:
    report = Report("test", ORACLE_TOLERANCE)
    compare_runs(report, "case", expected_from_recording(run), records)
    return report


def _with_result(records: list[StepRecord], step: int, **changes: object) -> list[StepRecord]:
    changed = list(records)
    changed[step] = replace(records[step], result=replace(records[step].result, **changes))
    return changed


def test_the_recorded_run_passes(run: RecordedRun, records: list[StepRecord]) -> None:
    report = _report(run, records)
    assert report.passed
    assert (report.samples, report.steps, report.problems) == (1, 8, [])
    assert 0 < report.max_abs_logit_error < 1e-5


def test_a_shift_of_the_logits_is_measured(run: RecordedRun, records: list[StepRecord]) -> None:
    shifted = _with_result(records, 3, logits=records[3].result.logits + np.float32(0.25))
    report = _report(run, shifted)
    assert not report.passed
    assert report.max_abs_logit_error == pytest.approx(0.25, abs=1e-4)
    assert report.tokens_identical


def test_nan_is_a_failure_and_stays_one(run: RecordedRun, records: list[StepRecord]) -> None:
    poisoned = records[2].result.logits.copy()  # type: ignore[union-attr]
    poisoned[0, 0, 0] = np.nan
    report = _report(run, _with_result(records, 2, logits=poisoned))
    assert not report.passed
    assert np.isnan(report.max_abs_logit_error)


@pytest.mark.parametrize("logits", [None, np.zeros((1, 16, 3), dtype=np.float32)])
def test_missing_or_misshapen_logits_are_a_failure(
    run: RecordedRun, records: list[StepRecord], logits: np.ndarray | None
) -> None:
    report = _report(run, _with_result(records, 1, logits=logits))
    assert not report.passed
    assert "no logits" in report.problems[0]
    assert report.max_abs_logit_error_at == "case, step 1"


def test_other_kept_tokens_are_a_true_flip(run: RecordedRun, records: list[StepRecord]) -> None:
    kept = records[4].result.kept.copy()  # type: ignore[union-attr]
    absent = np.setdiff1d(np.arange(36), kept[0])
    kept[0, 0] = absent[-1]
    report = _report(run, _with_result(records, 4, kept=np.sort(kept)))
    assert (report.kept_identical, report.passed, report.true_flips, report.near_ties) == (False, False, 1, 0)
    assert "step 4: kept tokens differ" in report.problems[0]


def test_a_near_tie_is_counted_apart(run: RecordedRun, records: list[StepRecord]) -> None:
    """Two candidates a few units in the last place apart: still not identical, but told from a true flip."""
    expected = list(expected_from_recording(run))
    kept, scores = expected[4].kept, expected[4].scores.copy()  # type: ignore[union-attr]
    absent = int(np.setdiff1d(np.arange(36), kept)[0])
    scores[absent] = scores[kept[0]] * np.float32(1 - 2e-7)  # type: ignore[index]
    expected[4] = replace(expected[4], scores=scores)
    found = records[4].result.kept.copy()  # type: ignore[union-attr]
    found[0, 0] = absent
    report = Report("test", ORACLE_TOLERANCE)
    compare_runs(report, "case", expected, _with_result(records, 4, kept=np.sort(found)))
    assert (report.kept_identical, report.true_flips, report.near_ties) == (False, 0, 1)


def test_merging_where_none_was_expected_is_a_failure(run: RecordedRun, records: list[StepRecord]) -> None:
    assert not _report(run, _with_result(records, 0, kept=np.zeros((1, 1), dtype=np.int64))).kept_identical
    assert not _report(run, _with_result(records, 5, kept=None)).kept_identical


def test_other_tokens_and_other_transfers_are_told_apart(run: RecordedRun, records: list[StepRecord]) -> None:
    tokens = records[-1].tokens.copy()
    tokens[0, 0] += 1
    report = _report(run, [*records[:-1], replace(records[-1], tokens=tokens)])
    assert (report.tokens_identical, report.transfers_identical) == (False, True)
    moved = records[1].transfer.copy()
    moved[0] = np.roll(moved[0], 1)
    report = _report(run, [records[0], replace(records[1], transfer=moved), *records[2:]])
    assert not report.transfers_identical


def test_flags_hold_over_the_whole_run(run: RecordedRun, records: list[StepRecord]) -> None:
    """After a first departure the later steps still say whether tokens and commits agree; logits no longer count."""
    kept = records[2].result.kept.copy()  # type: ignore[union-attr]
    kept[0, 0] = np.setdiff1d(np.arange(36), kept[0])[-1]
    changed = _with_result(records, 2, kept=np.sort(kept))
    report = _report(run, changed)
    assert (report.kept_identical, report.transfers_identical, report.tokens_identical) == (False, True, True)
    tokens = changed[-1].tokens.copy()
    tokens[0, 0] += 1
    report = _report(run, [*changed[:-1], replace(changed[-1], tokens=tokens)])
    assert (report.tokens_identical, report.true_flips, len(report.problems)) == (False, 1, 1)


@pytest.mark.parametrize(("off", "passes"), [(0.0, True), (0.01, False)])
def test_a_near_tied_merge_may_go_the_other_way_but_nowhere_else(
    run: RecordedRun, records: list[StepRecord], off: float, passes: bool
) -> None:
    """The other outcome is held to the same tolerance: an error beyond it still fails."""
    expected = list(expected_from_recording(run))
    other = expected[4].logits + np.float32(0.25)
    expected[4] = replace(expected[4], alternative_logits=(other,))
    report = Report("test", ORACLE_TOLERANCE)
    compare_runs(report, "case", expected, _with_result(records, 4, logits=other[None] + np.float32(off)))
    assert report.passed is passes
    assert any(line.endswith("(allowed 2e-04), at case, step 4") for line in report.lines()) is not passes
    assert report.near_tied_merges == 1
    assert report.max_abs_logit_error_at_near_ties == pytest.approx(0.25 + off, abs=1e-4)
    assert report.max_abs_logit_error == pytest.approx(off, abs=1e-4)


def test_a_near_tied_merge_excuses_neither_tokens_nor_nan(run: RecordedRun, records: list[StepRecord]) -> None:
    expected = list(expected_from_recording(run))
    expected[4] = replace(expected[4], alternative_logits=(expected[4].logits,))
    poisoned = _with_result(records, 4, logits=np.full_like(records[4].result.logits, np.nan))
    tokens = records[4].tokens.copy()
    tokens[0, 0] += 1
    for changed in (poisoned, [*records[:4], replace(records[4], tokens=tokens), *records[5:]]):
        report = Report("test", ORACLE_TOLERANCE)
        compare_runs(report, "case", expected, changed)
        assert not report.passed


def test_an_error_in_the_loop_is_a_failure_with_a_report(run: RecordedRun, records: list[StepRecord]) -> None:
    def stopping() -> Iterator[StepRecord]:
        yield records[0]
        raise D3tomError("a confidence that is not finite")

    report = Report("test", ORACLE_TOLERANCE)
    compare_runs(report, "case", expected_from_recording(run), stopping())
    assert not report.passed
    assert not report.tokens_identical
    assert "not finite" in report.problems[0]


@pytest.mark.parametrize("change", [lambda r: r[:-1], lambda r: [*r, r[-1]], lambda r: []])
def test_a_step_too_few_or_too_many_is_a_failure(run: RecordedRun, records: list[StepRecord], change) -> None:  # type: ignore[no-untyped-def]
    report = _report(run, change(records))
    assert not report.passed
    assert "steps ran, expected 8" in report.problems[-1]
    assert not report.tokens_identical


def test_an_empty_report_has_not_passed() -> None:
    assert not Report("test", 1.0).passed


def test_records_compare_equal_to_themselves(records: list[StepRecord]) -> None:
    report = Report("test", 0.0)
    compare_runs(report, "self", expected_from_records(records), records)
    assert report.passed
    assert report.max_abs_logit_error == 0.0


class Tampered(PyTorchBackend):
    """The oracle with one weight changed, as a wrong export would have it."""

    def start(self, prompt_embeddings: Floats, visual_positions: Ints, **more: Any):  # type: ignore[no-untyped-def]
        session = super().start(prompt_embeddings, visual_positions, **more)

        class Wrapped:
            first_token = session.first_token

            def step(self, request: StepRequest) -> StepResult:
                result = session.step(request)
                assert result.logits is not None
                return replace(result, logits=result.logits * np.float32(1.01))

        return Wrapped()


def test_a_wrong_backend_does_not_pass(run: RecordedRun) -> None:
    checkpoint = open_checkpoint(CASE)
    wrong = Tampered(load_model(checkpoint), run.merge)
    assert not validate_recorded(run, wrong, checkpoint.config, ORACLE_TOLERANCE).passed
