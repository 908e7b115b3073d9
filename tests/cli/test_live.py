"""``run --live``: what a terminal shows meanwhile and afterwards, and what others get instead."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from d3tom_export.api.answers import Step
from d3tom_export.api.pictures import see
from d3tom_export.api.settings import Asked
from d3tom_export.bundle.folder import Bundle
from d3tom_export.cli.live import LiveAnswer
from d3tom_export.config import GenerationConfig
from d3tom_export.pipeline import Reader
from d3tom_export.progress import no_note
from d3tom_export.prompt.pieces import Said
from tests.cli.screen import Screen, on_terminal
from tests.conftest import Invoke, picture

FRAME = re.compile(r"(?<=\x1b\[\?7h)(?=.)", re.DOTALL)
"""Behind a frame of the drawing, or what clears it."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "p.png"
    picture(40, 40).save(path)
    return path


def _is_drawing(line: str) -> bool:
    return line.startswith("step ") or "░" in line


def test_an_answer_is_drawn_in_place_and_cleared(bundle: Bundle, invoke: Invoke, image: Path) -> None:
    """One longer than the screen is high, whose tokens are bytes at random: all that a terminal could obey."""
    asked = ["run", bundle.folder, "--image", image, "--prompt", "What?", "--raw-text"]
    asked += ["--gen-length", 300, "--steps", 20, "--no-kv-cache"]
    plain = invoke(*asked)
    shown = on_terminal(*asked, "--live", size=(40, 6))
    assert (shown.code, shown.stdout) == (0, plain.stdout)
    screen, status = Screen(40, 6), []
    *frames, rest = FRAME.split(shown.told)
    for number, part in enumerate(frames):
        screen.feed(part)
        assert not any(map(_is_drawing, screen.scrolled)), "no line of the drawing is left behind"
        assert sum(line.startswith("step ") for line in screen.lines) == (number < len(frames) - 1)
        if number < len(frames) - 1:
            assert len(screen.lines) == 6
            assert screen.lines[-1].startswith("step ")
            status.append(screen.lines[-1])
    assert len(frames) == 22  # before the first step, each step, and the clearing
    visual = see(Reader.of_bundle(bundle), image, no_note).visual_tokens
    assert re.match(rf"step 0/20, \d+\.\d s, {visual} of {visual} visual", status[0])
    assert [line.split(",")[0] for line in status] == [f"step {step}/20" for step in range(21)]
    assert screen.bold, "what was just committed is"
    screen.feed(rest)
    left = [line for line in [*screen.scrolled, *screen.lines] if line]
    assert not any(map(_is_drawing, left))
    assert any(line.startswith("20 steps on onnxruntime") for line in left)
    assert screen.wraps


def test_an_interrupted_drawing_is_cleared(bundle: Bundle, image: Path) -> None:
    """Its last line is as wide as the terminal, which writes ^C behind the cursor."""
    asked = ["run", bundle.folder, "--image", image, "--prompt", "What?", "--gen-length", 300, "--no-early-exit"]
    shown = on_terminal(*asked, "--live", size=(40, 6), interrupt_at="step 3/")
    assert (shown.code, shown.stdout) == (1, "")
    screen = Screen(40, 6).feed(shown.told)
    left = [line for line in [*screen.scrolled, *screen.lines] if line]
    assert left[-1] == "Aborted!"
    assert not any(map(_is_drawing, left))
    assert screen.wraps


def test_a_terminal_without_colours_gets_none(bundle: Bundle) -> None:
    asked = ["run", bundle.folder, "--prompt", "What?", "--gen-length", 8, "--live"]
    told = {value: on_terminal(*asked, size=(40, 6), environment={"NO_COLOR": value}).told for value in ("", "1")}
    assert "\x1b[32m" in told[""]
    assert "\x1b[32m" not in told["1"]
    assert "\x1b[1m" in told["1"]


def test_steps_are_lines_where_no_cursor_moves(bundle: Bundle, invoke: Invoke, image: Path) -> None:
    asked = ["run", bundle.folder, "--image", image, "--prompt", "What?", "--raw-text", "--gen-length", 12, "--live"]
    asked += ["--steps", 4]
    piped = invoke(*asked)
    dumb = on_terminal(*asked, size=(40, 6), environment={"TERM": "dumb", "PYTHONIOENCODING": "ascii"})
    assert (piped.exit_code, dumb.code) == (0, 0)
    line = re.compile(r"\[ +\d+\.\d\d s\] step (\d)/4, \d+ of \d+ visual tokens kept: (.*)")
    for told, block in ((piped.stderr, "░"), (dumb.told.replace("\r\n", "\n"), "_")):
        steps = line.findall(told)
        assert [int(step) for step, _ in steps] == [1, 2, 3, 4]
        assert block in steps[0][1]
        assert block not in steps[3][1]
        assert "\x1b[?7l" not in told
        assert "".join(text for _, text in steps).isascii() == (block == "_")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_drawing_that_fails_is_cleared(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the terminal tells no size."""
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    reader = Reader.of_bundle(bundle)
    mask, suffix = reader.config.language.mask_token_id, reader.tokenizer.decode([65, 66])
    asked = Asked(reader, GenerationConfig(gen_length=4), bundle.manifest.merge, False, False)
    said = Said([mask] * 4 + [65, 66], [False] * 6)
    start = Step(0, 4, 7, 7, False, (mask,) * 4, (), said, asked)
    screen = Screen(80, 24)

    def fail() -> None:
        with LiveAnswer(start, seconds=lambda: 2.5):
            screen.feed(terminal.getvalue())
            assert screen.lines == [f"░░░░{suffix}", "step 0/4, 2.5 s, 7 of 7 visual tokens kept"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert Screen(80, 24).feed(terminal.getvalue()).lines == [""]
