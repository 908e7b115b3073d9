"""Pictures of strangers: as the release sees them within the limits, refused in one paragraph beyond."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from d3tom_export.errors import D3tomError
from d3tom_export.pictures.views import open_picture
from d3tom_export.trust import images
from d3tom_export.trust.images import decode_picture

NOISE = Image.effect_noise((31, 17), 80).convert("RGB")
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def _file(picture: Image.Image, kind: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    file.seek(0)
    return file


def _png_of(width: int, height: int) -> io.BytesIO:
    """A PNG whose header promises so many pixels, with hardly any behind it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return io.BytesIO(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "CMYK", "1", "PA"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_is_what_the_release_converts_it_to(kind: str, mode: str) -> None:
    try:
        file = _file(NOISE.convert(mode), kind)
    except (OSError, ValueError):  # the format has no such pictures
        file = _file(NOISE, kind)
    with warnings.catch_warnings(), Image.open(file) as picture:
        warnings.simplefilter("ignore")
        expected = picture.convert("RGB")
    file.seek(0)
    found = decode_picture(file, "p")
    assert (found.mode, found.size) == ("RGB", expected.size)
    assert found.tobytes() == expected.tobytes()


def test_no_warning_of_the_library_is_shown() -> None:
    logo = _file(Image.radial_gradient("L").convert("P"), "PNG", transparency=bytes([0] * 3 + [255] * 253))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_picture(logo, "logo").mode == "RGB"


@pytest.mark.parametrize(("orientation", "turned"), images._TURNS.items())
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_unless_ignored(kind: str, orientation: int, turned: Image.Transpose) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = _file(NOISE, kind, exif=exif)
    stored = Image.open(file).convert("RGB")
    file.seek(0)
    assert decode_picture(file, "p").tobytes() == stored.transpose(turned).tobytes()
    file.seek(0)
    assert decode_picture(file, "p", ignore_orientation=True).tobytes() == stored.tobytes()


def test_damaged_exif_data_turn_nothing() -> None:
    file = _file(NOISE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert decode_picture(file, "p").size == NOISE.size


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_taken_with_a_word(kind: str) -> None:
    first, second = Image.new("RGB", (20, 20), (200, 0, 0)), Image.new("RGB", (20, 20), (0, 0, 200))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    file = _file(first, kind, save_all=True, append_images=[second], **lossless)
    notes: list[str] = []
    found = np.asarray(decode_picture(file, "clip", note=notes.append)).astype(int)
    assert np.abs(found - np.asarray(first)).max() <= 2
    assert notes == ["clip holds several pictures (frames or pages); the first is shown to the model."]
    decode_picture(_file(first, kind), "still", note=notes.append)
    assert len(notes) == 1


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_beyond_the_exact_limit_is_decoded_smaller_with_a_word(
    progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = Image.radial_gradient("L").resize((801, 400)).convert("RGB")
    file = _file(smooth, "JPEG", quality=95, progressive=progressive)
    notes: list[str] = []
    assert decode_picture(file, "p", note=notes.append).size == (801, 400)
    assert not notes
    monkeypatch.setattr(images, "EXACT_PIXELS", 801 * 400 // 5)
    found = decode_picture(file, "photo", note=notes.append)
    assert found.size == (201, 100)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(smooth.resize((201, 100)))).mean() < 2
    assert "801 x 400 pixels" in notes[0]
    assert "at 1/4 of its size, 201 x 100" in notes[0]


def test_floating_point_grey_is_scaled_or_refused() -> None:
    notes: list[str] = []
    ramp = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
    found = decode_picture(_file(Image.fromarray(ramp), "TIFF"), "p", note=notes.append)
    assert np.asarray(found)[..., 0].tolist() == [[0, 51, 102], [153, 204, 255]]
    assert "1 is taken for white" in notes[0]
    found = decode_picture(_file(Image.fromarray(ramp * 200), "TIFF"), "p", note=notes.append)
    assert np.asarray(found)[..., 2].tolist() == [[0, 40, 80], [120, 160, 200]]
    assert len(notes) == 1
    for odd in (ramp - 2, ramp * 1000, np.full((2, 2), np.nan, dtype=np.float32)):
        with pytest.raises(D3tomError, match=r"floating-point grey from .* expected 0 to 1 or 0 to 255"):
            decode_picture(_file(Image.fromarray(odd), "TIFF"), "p")


def test_deep_grey_is_scaled_in_strips_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = np.arange(60, dtype=np.uint16).reshape(12, 5) * 1111
    monkeypatch.setattr(images, "_STRIP_PIXELS", 16)
    for kind in ("PNG", "TIFF"):
        found = decode_picture(_file(Image.fromarray(deep), kind), "p")
        assert np.array_equal(np.asarray(found)[..., 1], deep // 257)
    with pytest.raises(D3tomError, match="exceed 16 bits"):
        decode_picture(_file(Image.fromarray(deep.astype(np.int32) - 1), "TIFF"), "p")


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((1, 85_000_000), "sides of 262,144 pixels"),
        ((300_000, 2), "sides of 262,144 pixels"),
        ((20_000, 9_000), "megapixels"),
        ((2**31 - 1, 2**31 - 1), "megapixels"),
    ],
)
def test_too_large_pictures_are_refused_from_their_header(size: tuple[int, int], says: str) -> None:
    with pytest.raises(D3tomError, match=rf"too large.*{says}.*Scale it down"):
        decode_picture(_png_of(*size), "p")


def test_slow_variants_may_be_small_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = io.BytesIO(b"P3\n2 1\n255\n" + b"1 2 3 4 5 6\n")
    assert np.asarray(decode_picture(plain, "p")).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    monkeypatch.setattr(images, "_MOST_BYTES_IN_PYTHON", 20)
    with pytest.raises(D3tomError, match=r"a variant of PPM that is slow to read.*Save it as PNG"):
        decode_picture(plain, "p")
    decode_picture(_file(NOISE, "PPM"), "p")
    monkeypatch.setattr(images, "_MOST_BYTES", 20)
    with pytest.raises(D3tomError, match="at most 20 are read"):
        decode_picture(_file(NOISE, "PPM"), "p")


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called, ghostscript = tmp_path / "called", tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {called}\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = tmp_path / "photo.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(D3tomError, match="not a picture that can be decoded"):
        open_picture(path)
    assert not called.exists()
    for kind in ("DDS", "TGA", "ICO", "AVIF"):
        with pytest.raises(D3tomError, match="not a picture that can be decoded"):
            decode_picture(_file(NOISE.convert("RGB"), kind), "p")


def test_pictures_of_several_threads_leave_the_filters_as_they_were() -> None:
    """Two that are decoded at once, the first to begin being the first to end."""
    before = list(warnings.filters)
    files = [_file(NOISE, "PNG"), _file(NOISE, "BMP")]
    first, second = (images.opened_picture(file, "p") for file in files)
    with contextlib.ExitStack() as one, contextlib.ExitStack() as other:
        one.enter_context(first)
        other.enter_context(second)
        assert warnings.filters[0][0] == "ignore"
        one.close()
        assert warnings.filters[0][0] == "ignore"
    assert warnings.filters == before


def test_a_picture_of_pillows_is_what_its_file_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, mode, options in (
        ("PNG", "P", {}),
        ("TIFF", "I;16", {}),
        ("JPEG", "RGB", {"exif": exif}),
        ("PNG", "LA", {}),
    ):
        file = _file(NOISE.convert("L").convert(mode) if mode == "I;16" else NOISE.convert(mode), kind, **options)
        for ignores in (False, True):
            with Image.open(file) as opened:
                found = images.as_rgb(opened, "p", ignore_orientation=ignores)
            expected = decode_picture(file, "p", ignore_orientation=ignores)
            assert np.array_equal(np.asarray(found), np.asarray(expected)), (kind, mode)
    with pytest.raises(D3tomError, match="p is too large"):
        images.as_rgb(Image.new("L", (images.LONGEST_SIDE + 1, 1)), "p")
    with pytest.raises(D3tomError, match="p is 0 x 4 pixels large"):
        images.as_rgb(Image.new("L", (0, 4)), "p")


def _seeds() -> list[bytes]:
    gif = _file(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(180)])
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        *(_file(NOISE, kind).getvalue() for kind in FORMATS),
        *(_file(NOISE, "TIFF", compression=how).getvalue() for how in ("tiff_lzw", "jpeg", "packbits", "tiff_deflate")),
        _file(NOISE.convert("1"), "TIFF", compression="group4").getvalue(),
        _file(NOISE, "JPEG", progressive=True, exif=exif).getvalue(),
        _file(NOISE.convert("P"), "PNG", transparency=bytes(256)).getvalue(),
        _file(Image.fromarray(np.ones((5, 5), np.float32)), "TIFF").getvalue(),
        gif.getvalue(),
        b"P3\n2 1\n255\n1 2 3 4 5 6\n",
    ]


SEEDS = _seeds()


def mutated(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of ``seeds`` with a few bytes overwritten, often near its head, and perhaps cut short."""

    def mutate(seed: bytes, edits: list[tuple[float, bool, int]], keep: float) -> bytes:
        content = bytearray(seed)
        for where, head, byte in edits:
            content[int(where * (min(len(content), 64) if head else len(content)))] = byte
        return bytes(content[: max(1, int(len(content) * keep))])

    place = st.floats(0, 1, exclude_max=True)
    edits = st.lists(st.tuples(place, st.booleans(), st.integers(0, 255)), max_size=6)
    return st.builds(mutate, st.sampled_from(seeds), edits, st.one_of(st.just(1.0), place))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=mutated(SEEDS))
def test_a_damaged_picture_gives_a_picture_or_a_paragraph(content: bytes) -> None:
    with contextlib.suppress(D3tomError):
        assert decode_picture(io.BytesIO(content), "p", note=str).mode == "RGB"
