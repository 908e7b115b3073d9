"""``run``: what it shows of pictures and answers, and what it says beside them."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from d3tom_export.bundle.folder import Bundle
from d3tom_export.cli import run_command
from d3tom_export.prompt.reader import Reader
from d3tom_export.trust.terminal import legible
from tests.cli.conftest import Invoke
from tests.conftest import picture


def _answer(invoke: Invoke, bundle: Bundle, *arguments: object) -> dict:
    result = invoke("run", bundle.folder, "--prompt", "What?", "--gen-length", 4, "--json", "-", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_has_the_contracts_fields_and_raw_text_is_of_all_ids(
    bundle: Bundle, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, raw = _answer(invoke, bundle), _answer(invoke, bundle, "--raw-text")
    assert plain["token_ids"] == raw["token_ids"]
    assert plain["steps"] == len(plain["kept"]) == 4
    reader = Reader.of_bundle(bundle)
    assert raw["text"] == reader.tokenizer.decode(raw["token_ids"], skip_special_tokens=True).lstrip("!")
    monkeypatch.setattr(Reader, "text", lambda self, ids, raw=False: "all of it" if raw else "cut")
    assert (_answer(invoke, bundle)["text"], _answer(invoke, bundle, "--raw-text")["text"]) == ("cut", "all of it")


def test_photos_are_upright_and_frames_are_spoken_of(bundle: Bundle, invoke: Invoke, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo, clip = tmp_path / "photo.jpg", tmp_path / "clip\x1b[31m.gif"
    picture(28, 112).save(photo, exif=exif)
    picture(112, 28).save(clip, save_all=True, append_images=[picture(112, 28, 1)])
    upright = _answer(invoke, bundle, "--image", photo)
    stored = _answer(invoke, bundle, "--image", photo, "--ignore-orientation")
    assert upright["visual_tokens"] != stored["visual_tokens"]
    animated = invoke("run", bundle.folder, "--prompt", "What?", "--gen-length", 4, "--image", clip)
    assert animated.exit_code == 0
    assert "holds several pictures (frames or pages); the first is shown" in animated.stderr
    assert "\x1b" not in animated.output
    assert "Warning" not in animated.stderr


def test_what_is_no_picture_is_refused_before_a_runtime_is_opened(
    bundle: Bundle, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3tom_export.backends.select.open_backend", None)
    pipe, many = tmp_path / "pipe.png", [argument for _ in range(99) for argument in ("--image", tmp_path / "absent")]
    os.mkfifo(pipe)
    for arguments, says in (
        (["--image", pipe], "is a named pipe, expected a regular file"),
        (["--image", tmp_path], "is a folder"),
        (["--image", "/dev/zero"], "is a device"),
        (many, "exceeds this model's limit"),
        (["--prompt", "caf\udce9"], "not UTF-8"),
    ):
        result = invoke("run", bundle.folder, "--prompt", "?", *arguments)
        assert result.exit_code == 1, result.output
        assert says in result.stderr


def test_a_terminal_obeys_nothing_in_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert legible("two\nlines\tof 👩‍👩‍👧 text") == "two\nlines\tof 👩‍👩‍👧 text"
    assert legible("\x1b[31m\r\x00\u202e\x9b\ud800") == r"\x1b[31m\r\x00\u202e\x9b\ud800"
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run_command._shown("é\x1b") == "\\xe9\x1b"  # a file gets the character that a terminal would obey
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    assert run_command._shown("é\x1b") == r"\xe9\x1b"
