"""Questions about pictures to validate and measure with: a model's own, or made-up ones. Imports no framework."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d3tom_export.config import TOKENIZER_FILE, ModelConfig
from d3tom_export.errors import D3tomError, printable
from d3tom_export.trust.archives import open_archive
from d3tom_export.trust.documents import parse_json
from d3tom_export.trust.files import check_name, find_inside, is_there
from d3tom_export.trust.images import decode_picture, opened_picture

SAMPLES_FILE = "samples.zip"
"""A zip of pictures and ``samples.jsonl``, one object a line: image, prompt, answer, kind. May lie in a checkpoint."""

INDEX = "samples.jsonl"
MOST_INDEX_BYTES = 16 << 20
_LONGEST_LINE = 1 << 20
MOST_PICTURE_BYTES = 64 << 20
_MOST_PIXELS = 1 << 28
"""Of all pictures together: they are held in memory at once, 4 bytes a pixel."""

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


def load_samples(
    path: Path,
    count: int | None = None,
    *,
    fewer: bool = False,
    ignore_orientation: bool = False,
) -> list[Sample]:
    """The first ``count`` samples of a samples file (None: all); no other entry is read.

    A file without any sample is refused, one with less than ``count`` too unless ``fewer`` will do. Pictures are
    decoded as by :func:`~d3tom_export.pictures.views.open_picture`, all of them together within 256 megapixels. Raises
    :class:`D3tomError`.
    """
    samples: list[Sample] = []
    pixels = 0
    try:
        with open_archive(path) as archive:
            for number, line in numbered_lines(archive.read(INDEX, MOST_INDEX_BYTES), f"its {INDEX}"):
                if count is not None and len(samples) >= count:
                    break
                where = f"line {number} of its {INDEX}"
                entry = _entry(line, where)
                picture = None
                if entry["image"] is not None:
                    try:
                        content = archive.read(check_name(entry["image"]), MOST_PICTURE_BYTES)
                    except D3tomError as error:
                        raise ValueError(f"{where}: {error}".rstrip(".")) from None
                    name = f"{printable(entry['image'], 80)} in {path}"
                    with opened_picture(io.BytesIO(content), name) as header:
                        pixels += header.width * header.height
                    if pixels > _MOST_PIXELS:
                        raise ValueError(
                            f"its pictures up to {where} have {pixels / 1e6:,.0f} megapixels together, at most "
                            f"{_MOST_PIXELS / 1e6:.0f} are held in memory"
                        )
                    picture = decode_picture(io.BytesIO(content), name, ignore_orientation=ignore_orientation)
                samples.append(Sample(entry["prompt"], picture, entry["answer"], entry["kind"]))
    except ValueError as error:
        raise D3tomError(
            f"{path} is not a samples file: {printable(str(error), 300)}. Expected a zip of pictures and {INDEX}, one "
            "JSON object a line: image, prompt, answer, kind."
        ) from None
    if not samples and count != 0:
        raise D3tomError(
            f"{path} has no sample: its {INDEX} is empty. Put one JSON object a line there (image, prompt, answer, "
            "kind), or remove the file to have samples made up."
        )
    if count is not None and len(samples) < count and not fewer:
        raise D3tomError(f"{path} has {len(samples)} samples and {count} were asked for. Ask for fewer with --samples.")
    return samples


def numbered_lines(content: bytes, name: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, of at most a mebibyte each. Raises ``ValueError`` that calls it ``name``."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if len(line) > _LONGEST_LINE:
            raise ValueError(f"line {number} of {name} has {len(line):,} bytes, at most {_LONGEST_LINE:,} are read")
        if line.strip():
            yield number, line


def _entry(line: bytes, where: str) -> dict[str, Any]:
    """One sample's fields, each of its kind or None."""
    try:
        raw = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON object: {error}") from None
    for field in ("image", "prompt", "answer", "kind"):
        value = raw.get(field)
        if not isinstance(value, str) and (value is not None or field == "prompt"):
            raise ValueError(f"{where} has {printable(repr(value), 60)} for {field}, expected a text")
    return {
        "image": raw.get("image"),
        "prompt": raw["prompt"],
        "answer": raw.get("answer"),
        "kind": raw.get("kind") or "",
    }


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
    if is_there(folder, SAMPLES_FILE):
        return load_samples(find_inside(folder, SAMPLES_FILE), count)
    return synthetic_samples(config, count) if (folder / TOKENIZER_FILE).is_file() else token_samples(config, count)
