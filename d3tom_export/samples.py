"""Questions about pictures to validate and measure with: a model's own, or made-up ones. Imports no framework."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

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


def load_samples(path: Path, count: int | None = None) -> list[Sample]:
    """The first ``count`` samples of a samples file (None: all)."""
    try:
        with zipfile.ZipFile(path) as archive:
            lines = archive.read(_INDEX).decode("utf-8").splitlines()
            samples = []
            for line in lines[:count]:
                entry = json.loads(line)
                picture = Image.open(io.BytesIO(archive.read(entry["image"]))).convert("RGB")
                samples.append(Sample(entry["prompt"], picture, entry.get("answer"), entry.get("kind", "")))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise D3tomError(f"{path} is not a samples file: {error!r}. Expected a zip of pictures and {_INDEX}.") from None
    if count is not None and len(samples) < count:
        raise D3tomError(f"{path} has {len(samples)} samples and {count} were asked for. Ask for fewer with --samples.")
    return samples


def synthetic_samples(config: ModelConfig, count: int, seed: int = 0) -> list[Sample]:
    """Seeded pictures of smooth colour in several sizes and aspect ratios, with a stock question.

    They exercise every stage and shape; no right answer is known.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        question = "Describe the picture." if config.vision else f"Write a sentence about the number {index}."
        picture = None
        if config.vision is not None:
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            picture = coarse.resize(_SYNTHETIC_SIZES[index % len(_SYNTHETIC_SIZES)], Image.Resampling.BICUBIC)
        samples.append(Sample(question, picture))
    return samples


def samples_for(folder: Path, config: ModelConfig, count: int) -> list[Sample]:
    """The folder's own samples where it has any, else synthetic ones."""
    path = folder / SAMPLES_FILE
    return load_samples(path, count) if path.is_file() else synthetic_samples(config, count)
