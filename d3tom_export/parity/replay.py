"""A recorded run against a backend: every step, and what became of its picture."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from d3tom_export.config import ModelConfig, VisionConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import Floats
from d3tom_export.parity.bounds import relative_difference
from d3tom_export.parity.recorded import RecordedPicture, RecordedRun
from d3tom_export.parity.validate import ExpectedStep, Report, compare_runs
from d3tom_export.pictures.views import open_picture, pack_features, prepare_picture, resized
from d3tom_export.pipeline import run_loop, splice


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
        for what, difference in _picture_differences(run, run.picture, backend, config):
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


def _picture_differences(
    run: RecordedRun, picture: RecordedPicture, backend: Backend, config: ModelConfig
) -> Iterator[tuple[str, float]]:
    """What is compared and by how much it differs, relative to the largest: pixels, features, prompt embeddings."""
    if config.vision is None:
        raise D3tomError(f"The recorded run {run.name} has a picture, and its model has no vision tower.")
    views = prepare_picture(open_picture(picture.path), config.vision)
    recorded = len(picture.pixel_values)
    yield "the first views' pixels", relative_difference(views.pixel_values[:recorded], picture.pixel_values)
    features = backend.encode_views(views.pixel_values)
    yield "the views' features", relative_difference(features, _pooled(picture.features, config.vision))
    visual = pack_features(features, backend.image_newline, views.packing)
    prompt = splice(backend, picture.prompt_ids, [visual])
    yield "the prompt's embeddings", relative_difference(prompt.embeddings, run.prompt_embeddings)
    same = np.array_equal(prompt.visual_positions, run.visual_positions)
    yield "the picture's place in the prompt", 0.0 if same else float("inf")


def _pooled(features: Floats, config: VisionConfig) -> Floats:
    """Recorded features (views, patches, D) as the model gives them: pooled where it pools."""
    if not config.pooled:
        return features
    side, pooled = config.patches_per_side, config.tokens_per_side
    packing = resized(np.arange(side * side).reshape(side, side), pooled, pooled)
    none = np.zeros(features.shape[-1], np.float32)
    return np.stack([pack_features(view[None], none, packing) for view in features])
