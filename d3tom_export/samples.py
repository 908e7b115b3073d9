"""Questions about pictures to validate and measure with: a model's own, or made-up ones. Imports no framework."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d3tom_export.checkpoint import TOKENIZER_FILE
from d3tom_export.config import ModelConfig
from d3tom_export.errors import D3tomError

SAMPLES_FILE = "samples.zip"
"""A zip of pictures and ``samples.jsonl``, one object a line: image, prompt, answer, kind. May lie in a checkpoint."""

_INDEX = "samples.jsonl"
_SYNTHETIC_SIZES = ((512, 512), (640, 480), (480, 640), (300, 1000), (1000, 300), (96, 80))


@dataclass(frozen=True)
class Sample:
    """One question; ``answer`` is None where no right answer is known."""

    question: str
    picture: Image.Image | None
    answer: str | None = None
    kind: str = ""


@dataclass(frozen=True)
class TokenSample:
    """A prompt of token ids for a model without eyes, some of them standing in for visual tokens."""

    token_ids: NDArray[np.int64]
    """(1, P)."""
    visual_positions: NDArray[np.int64]
    """(V,), ascending."""


def load_samples(path: Path, count: int | None = None) -> list[Sample]:
    """The first ``count`` samples of a samples file (None: all)."""
    try:
        with zipfile.ZipFile(path) as archive:
            lines = archive.read(_INDEX).decode("utf-8").splitlines()
            samples = []
            for line in lines[:count]:
                entry = json.loads(line)
                picture = None
                if entry.get("image") is not None:
                    picture = Image.open(io.BytesIO(archive.read(entry["image"]))).convert("RGB")
                samples.append(Sample(entry["prompt"], picture, entry.get("answer"), entry.get("kind", "")))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise D3tomError(f"{path} is not a samples file: {error!r}. Expected a zip of pictures and {_INDEX}.") from None
    if count is not None and len(samples) < count:
        raise D3tomError(f"{path} has {len(samples)} samples and {count} were asked for. Ask for fewer with --samples.")
    return samples


def synthetic_samples(config: ModelConfig, count: int, seed: int = 0) -> list[Sample] | list[TokenSample]:
    """Seeded prompts in several sizes that exercise every stage and shape; no right answer is known.

    A model with eyes is shown smooth colours in several sizes and aspect ratios. One without is given random tokens, a
    run of which counts as visual, so that merging is exercised all the same.
    """
    rng = np.random.default_rng(seed)
    if config.vision is None:
        return token_samples(config, count, seed)
    samples = []
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        picture = coarse.resize(_SYNTHETIC_SIZES[index % len(_SYNTHETIC_SIZES)], Image.Resampling.BICUBIC)
        samples.append(Sample("Describe the picture.", picture))
    return samples


def token_samples(config: ModelConfig, count: int, seed: int = 0) -> list[TokenSample]:
    """Seeded prompts of random tokens: for a model without eyes, or one without a tokenizer to ask it with."""
    rng = np.random.default_rng(seed)
    return [_token_sample(config, rng) for _ in range(count)]


def _token_sample(config: ModelConfig, rng: np.random.Generator) -> TokenSample:
    before, visual, after = rng.integers(4, 24), rng.integers(24, 96), rng.integers(4, 24)
    ids = rng.integers(0, config.language.vocab_rows, (1, before + visual + after))
    return TokenSample(ids, np.arange(before, before + visual))


def samples_for(folder: Path, config: ModelConfig, count: int) -> list[Sample] | list[TokenSample]:
    """The folder's own samples where it has any, else synthetic ones: of tokens where it has no tokenizer."""
    path = folder / SAMPLES_FILE
    if path.is_file():
        return load_samples(path, count)
    return synthetic_samples(config, count) if (folder / TOKENIZER_FILE).is_file() else token_samples(config, count)
