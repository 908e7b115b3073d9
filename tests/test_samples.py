"""Samples files and made-up samples."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from d3tom_export.checkpoint import TOKENIZER_FILE
from d3tom_export.config import ModelConfig
from d3tom_export.errors import D3tomError
from d3tom_export.samples import Sample, TokenSample, load_samples, samples_for, synthetic_samples
from tests.conftest import picture, raw_config


def _write(path: Path, count: int) -> None:
    lines = []
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(count):
            buffer = io.BytesIO()
            picture(20, 10, index).save(buffer, "PNG")
            archive.writestr(f"{index}.png", buffer.getvalue())
            lines.append(json.dumps({"image": f"{index}.png", "prompt": "?", "answer": str(index), "kind": "test"}))
        archive.writestr("samples.jsonl", "\n".join(lines))


def test_reads_the_first_samples(tmp_path: Path) -> None:
    _write(tmp_path / "samples.zip", 3)
    samples = load_samples(tmp_path / "samples.zip", 2)
    assert [sample.answer for sample in samples] == ["0", "1"]
    assert samples[0].picture is not None
    assert samples[0].picture.size == (20, 10)
    assert len(load_samples(tmp_path / "samples.zip")) == 3
    with pytest.raises(D3tomError, match="has 3 samples and 4 were asked for"):
        load_samples(tmp_path / "samples.zip", 4)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples.zip").write_bytes(b"PK")
    with pytest.raises(D3tomError, match="is not a samples file"):
        load_samples(tmp_path / "samples.zip")


def test_made_up_samples_repeat_and_vary_in_size(tmp_path: Path) -> None:
    config = ModelConfig.from_json(raw_config())
    samples = synthetic_samples(config, 6)
    assert len({sample.picture.size for sample in samples}) == 6  # type: ignore[union-attr]
    assert isinstance(samples_for(tmp_path, config, 1)[0], TokenSample)  # no tokenizer: nobody could ask
    (tmp_path / TOKENIZER_FILE).touch()
    again = samples_for(tmp_path, config, 6)
    for one, two in zip(samples, again, strict=True):
        assert isinstance(one, Sample)
        assert isinstance(two, Sample)
        assert np.array_equal(one.picture, two.picture)


def test_a_model_without_eyes_gets_tokens_some_of_which_count_as_visual() -> None:
    config = ModelConfig.from_json({k: v for k, v in raw_config().items() if "vision" not in k})
    for sample in synthetic_samples(config, 5):
        assert isinstance(sample, TokenSample)
        assert sample.token_ids.max() < config.language.vocab_rows
        assert sample.visual_positions[0] > 0
        assert sample.visual_positions[-1] < sample.token_ids.shape[1]
