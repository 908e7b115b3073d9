"""A run of the loop against a recorded one: the same comparison as of two runs (parity/validate.py)."""

from __future__ import annotations

from collections.abc import Iterator

from d3tom_export.config import ModelConfig
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.run import run_loop
from d3tom_export.parity.recorded import RecordedRun
from d3tom_export.parity.recorded_pictures import picture_differences
from d3tom_export.parity.validate import ExpectedStep, Report, compare_runs


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


def validate_recorded(run: RecordedRun, backend: Backend, config: ModelConfig, tolerance: float) -> Report:
    """Run a recorded case on ``backend`` and compare every step, and what became of its picture where it has one."""
    report = Report(backend.name, tolerance, compared_with=f"the recorded run {run.name}")
    if run.picture is not None:
        for what, difference in picture_differences(run, run.picture, backend, config):
            report.note_embeddings(f"{run.name}: {what}", difference)
    prompt = Prompt(run.prompt_embeddings, run.visual_positions)
    records = run_loop(backend, prompt, config.language.mask_token_id, run.generation, run.merge, logits=True)
    last = compare_runs(report, run.name, expected_from_recording(run), records)
    if run.returned is not None and last is not None:
        returned = (*last.tokens[0, : last.end[0]].tolist(), *run.generation.suffix_ids)
        if returned != run.returned:
            report.tokens_identical = False
            report.problems.append(f"{run.name}: {list(returned)} was returned, expected {list(run.returned)}")
    return report
