"""Samples to quantize by: questions with pictures and half-denoised answers, at the input of a model's first layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.checkpoint.folder import Checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.checkpoint.tensors import LAYERS
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.pipeline import Reader, embed_sample
from d3tom_export.progress import Progress
from d3tom_export.prompt.samples import Sample, TokenSample
from d3tom_export.quantize.calibration import Calibration

_LEAST_MASKED = 0.1
"""Share of an answer's tokens; the share is drawn for each sample, as denoising passes through all of them."""


def calibration_of(
    checkpoint: Checkpoint,
    samples: Sequence[Sample | TokenSample],
    reader: Reader | None,
    generation: GenerationConfig,
    progress: Progress,
) -> Calibration:
    """``samples`` with answers of the usual length, part of them masked: their own, or words of the question.

    The vision tower and the embedding table are run, in float32, from their files; no layer of the language model is.
    """
    model = load_model(checkpoint, streamed=True)
    backend = PyTorchBackend(model, MergeConfig(0, 0.0))
    mask_id, rng = checkpoint.config.language.mask_token_id, np.random.default_rng(0)
    rows = []
    for done, sample in enumerate(samples):
        progress("embedding samples to quantize by", done, len(samples))
        prompt = embed_sample(backend, sample, reader, generation)
        answer = np.resize(_words(sample, reader), generation.gen_length)[None]
        masked = rng.random(answer.shape) < rng.uniform(_LEAST_MASKED, 1.0)
        embedded = backend.embed_tokens(np.where(masked, mask_id, answer))
        rows.append(torch.from_numpy(np.concatenate([prompt.embeddings, embedded], axis=1)))

    def read(layer: int) -> Mapping[str, Tensor]:
        path = f"{LAYERS}{layer}."
        names = [name for name in checkpoint.tensors if name.startswith(path)]
        return {name.removeprefix(path): tensor for name, tensor in checkpoint.read(names)}

    return Calibration(model.transformer, read, rows)


def _words(sample: Sample | TokenSample, reader: Reader | None) -> np.ndarray:
    if isinstance(sample, TokenSample) or reader is None:
        assert isinstance(sample, TokenSample)
        return sample.token_ids[0]
    if sample.answer:
        return np.array(reader.tokenizer.encode(sample.answer, add_special_tokens=False).ids)
    return np.array(reader.token_ids(sample.question, 0))
