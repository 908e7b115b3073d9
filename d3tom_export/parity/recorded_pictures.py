"""What became of a recorded run's picture: its views, their features, and the prompt that they stand in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from d3tom_export.config import ModelConfig, VisionConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Backend
from d3tom_export.loop.denoise import Floats
from d3tom_export.parity.bounds import relative_difference
from d3tom_export.parity.recorded import RecordedPicture, RecordedRun
from d3tom_export.prompt.pictures import open_picture, pack_features, prepare_picture, resized
from d3tom_export.prompt.reader import splice


def picture_differences(
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
