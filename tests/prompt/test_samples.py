"""Samples files and made-up samples."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from d3tom_export.config import TOKENIZER_FILE
from d3tom_export.errors import D3tomError
from d3tom_export.families.registry import read_config
from d3tom_export.prompt import samples as samples_module
from d3tom_export.prompt.samples import Sample, TokenSample, load_samples, samples_for, synthetic_samples
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


def _archive(path: Path, index: str | bytes | None, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        if index is not None:
            archive.writestr("samples.jsonl", index)
    return path


def _png(**options: Any) -> bytes:
    file = io.BytesIO()
    picture(20, 10).save(file, "PNG", **options)
    return file.getvalue()


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = _archive(tmp_path / "samples.zip", '{"prompt": "a", "image": "x"}\n\n{"image": 3', x=_png())
    assert len(load_samples(path, 1)) == 1
    with pytest.raises(D3tomError, match=r"line 3 of its samples\.jsonl is no JSON object"):
        load_samples(path, 2)
    assert len(load_samples(_archive(path, '{"prompt": "a"}'), 2, fewer=True)) == 1


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (None, "it has no samples.jsonl"),
        ("", "has no sample: its samples.jsonl is empty"),
        ("\n \n", "has no sample"),
        (b"\xff", "line 1 .* is not UTF-8"),
        ("[1]", "JSON list, expected an object"),
        ('{"image": null}', "line 1 .* has None for prompt, expected a text"),
        ('{"prompt": 5}', "has 5 for prompt"),
        ('{"prompt": "a", "image": 7}', "has 7 for image"),
        ('{"prompt": "a", "answer": [1]}', r"has \[1\] for answer"),
        ('{"prompt": "a", "kind": {}}', "has {} for kind"),
        ('{"prompt": "a"}\n{"prompt": NaN}', "line 2"),
        ('{"prompt": "a", "image": "/etc/passwd"}', "'/etc/passwd' is no plain name"),
        ('{"prompt": "a", "image": "../x"}', "'../x' is no plain name"),
        ('{"prompt": "a", "image": "absent"}', "it has no absent"),
        ('{"prompt": "a", "image": "text"}', "text in .*samples.zip is not a picture"),
        ('{"prompt": "a", "image": "zip"}', "zip in .*samples.zip is not a picture"),
        ('{"prompt": "' + "a" * (1 << 20) + '"}', "line 1 .* at most 1,048,576 are read"),
        (" " * (17 << 20), "samples.jsonl in it has 17,825,792 bytes, at most 16,777,216 are read"),
    ],
)  # fmt: skip
def test_what_a_stranger_wrote_is_refused_in_a_paragraph(tmp_path: Path, index: str | bytes | None, says: str) -> None:
    path = _archive(tmp_path / "samples.zip", index, text=b"%!PS-Adobe-3.0", zip=b"PK\5\6" + b"\0" * 18)
    with pytest.raises(D3tomError, match=says):
        load_samples(path)


def test_pictures_have_limits_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _archive(tmp_path / "samples.zip", '{"prompt": "a", "image": "x"}\n' * 3, x=_png())
    monkeypatch.setattr(samples_module, "_MOST_PIXELS", 450)
    assert len(load_samples(path, 2)) == 2
    with pytest.raises(D3tomError, match=r"up to line 3 .* at most 0 are held in memory"):
        load_samples(path)
    monkeypatch.setattr(samples_module, "MOST_PICTURE_BYTES", 10)
    with pytest.raises(D3tomError, match=r"x in it has [\d,]+ bytes, at most 10 are read"):
        load_samples(path)


def test_members_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = _archive(tmp_path / "samples.zip", '{"prompt": "a"}')
    whole = path.read_bytes()
    directory = whole.index(b"PK\1\2")

    def changed(offset: int, value: bytes) -> Path:
        path.write_bytes(whole[:offset] + value + whole[offset + len(value) :])
        return path

    with pytest.raises(D3tomError, match="is encrypted"):
        load_samples(changed(directory + 8, b"\x01"))
    with pytest.raises(D3tomError, match="only deflate is"):
        load_samples(changed(directory + 10, b"\x0e"))
    with pytest.raises(D3tomError, match="Bad CRC-32"):
        load_samples(changed(directory + 16, b"\0\0\0\0"))
    with pytest.raises(D3tomError, match="is not a samples file"):
        load_samples(changed(directory + 24, b"\xff\xff\xff\xff"))


def test_a_large_table_of_members_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "samples.zip"
    entry = b"PK\1\2" + b"\0" * 42
    table = entry * (9 * 1024 * 1024 // len(entry))
    end = b"PK\5\6" + b"\0" * 8 + len(table).to_bytes(4, "little") + b"\0" * 6
    path.write_bytes(table + end)
    with pytest.raises(D3tomError, match="its table of members takes"):
        load_samples(path)


def test_orientation_of_samples(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = _archive(tmp_path / "samples.zip", '{"prompt": "a", "image": "x"}', x=_png(exif=exif))
    (upright,), (stored,) = load_samples(path), load_samples(path, ignore_orientation=True)
    assert upright.picture is not None
    assert stored.picture is not None
    assert (upright.picture.size, stored.picture.size) == ((10, 20), (20, 10))


def test_a_folders_samples_are_never_passed_over(tmp_path: Path) -> None:
    config = read_config(raw_config())
    path = tmp_path / "samples.zip"
    os.mkfifo(path)
    with pytest.raises(D3tomError, match="named pipe"):
        samples_for(tmp_path, config, 1)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(D3tomError, match="leads out of its folder"):
        samples_for(tmp_path, config, 1)
    path.unlink()
    _archive(path, "")
    with pytest.raises(D3tomError, match="has no sample"):
        samples_for(tmp_path, config, 1)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.booleans(), st.integers(0, 255)), max_size=5),
    keep=st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5]),
)
def test_a_damaged_samples_file_gives_samples_or_a_paragraph(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[float, bool, int]], keep: float
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "samples.zip"
    index = '{"prompt": "a", "image": "x", "answer": "1"}\n{"prompt": "b"}'
    content = bytearray(_archive(path, index, x=_png()).read_bytes())
    tail = len(content) - 200  # where the table of members is
    for where, at_tail, byte in edits:
        place = int(tail + where * 200 if at_tail else where * len(content))
        content[min(place, len(content) - 1)] = byte  # the product may round up to the whole
    path.write_bytes(content[: int(len(content) * keep)])
    with contextlib.suppress(D3tomError):
        assert len(load_samples(path)) >= 1


def test_made_up_samples_repeat_and_vary_in_size(tmp_path: Path) -> None:
    config = read_config(raw_config())
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
    config = read_config({k: v for k, v in raw_config().items() if "vision" not in k})
    for sample in synthetic_samples(config, 5):
        assert isinstance(sample, TokenSample)
        assert sample.token_ids.max() < config.language.vocab_rows
        assert sample.visual_positions[0] > 0
        assert sample.visual_positions[-1] < sample.token_ids.shape[1]
