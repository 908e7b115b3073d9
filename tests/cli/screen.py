"""A terminal's screen, as far as our drawing needs one, and commands that run on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import unicodedata
from collections.abc import Mapping
from typing import NamedTuple

_CODE = re.compile(r"\x1b\[(\??)(\d*(?:;\d+)*)([A-Za-z])")


class Screen:
    """What stands on so many ``columns`` and ``rows``, and what left them at the top; knows no code but ours."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.scrolled: list[str] = []
        self.wraps = True
        self.bold: set[str] = set()
        """Characters that were written in bold."""
        self._cells = [[" "] * columns for _ in range(rows)]
        self._row = self._column = 0
        self._is_bold = False

    def feed(self, text: str) -> Screen:
        at = 0
        while at < len(text):
            if text[at] == "\x1b":
                code = _CODE.match(text, at)
                assert code is not None, f"no code of ours: {text[at : at + 20]!r}"
                self._obey(*code.groups())
                at = code.end()
                continue
            self._write(text[at])
            at += 1
        return self

    def _obey(self, private: str, number: str, letter: str) -> None:
        if (private, letter) == ("", "A"):
            self._row = max(0, self._row - int(number or 1))
        elif (private, number, letter) == ("", "", "K"):
            self._column = min(self._column, self.columns - 1)
            self._cells[self._row][self._column :] = [" "] * (self.columns - self._column)
        elif (private, letter) == ("", "m"):
            self._is_bold = "1" in number.split(";") or (self._is_bold and number != "0")
        elif (private, number) == ("?", "7"):
            self.wraps = letter == "h"
        else:
            raise AssertionError(f"no code of ours: {private}{number}{letter}")

    def _write(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._down()
        else:
            assert unicodedata.category(character) != "Cc", repr(character)
            self._print(character)

    def _print(self, character: str) -> None:
        if unicodedata.category(character) in ("Mn", "Me", "Cf"):
            return
        wide = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self._column + wide > self.columns:
            if self.wraps:
                self._column = 0
                self._down()
            else:
                self._column = self.columns - wide
        self._cells[self._row][self._column : self._column + wide] = [character] + [""] * (wide - 1)
        self._column += wide
        if self._is_bold:
            self.bold.add(character)

    def _down(self) -> None:
        self._row += 1
        if self._row == self.rows:
            self.scrolled.append(self._text(0))
            self._cells = [*self._cells[1:], [" "] * self.columns]
            self._row -= 1

    def _text(self, row: int) -> str:
        return "".join(self._cells[row]).rstrip()

    @property
    def lines(self) -> list[str]:
        """The screen's, without the empty ones at its end."""
        return "\n".join(self._text(row) for row in range(self.rows)).rstrip("\n").split("\n")


class OnTerminal(NamedTuple):
    """A command that ran on a pseudo-terminal."""

    code: int
    told: str
    """What it wrote there."""
    stdout: str
    """What its standard output got, where that was none."""


def on_terminal(
    *arguments: object,
    size: tuple[int, int],
    environment: Mapping[str, str] | None = None,
    interrupt_at: str | None = None,
    whole: bool = False,
) -> OnTerminal:
    """``d3tom-export`` with standard error on a terminal of so many columns and rows; the ``whole``: its output too.

    Ctrl-C is pressed once it has written ``interrupt_at`` there.
    """
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", size[1], size[0], 0, 0))
    wanted = {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **(environment or {})}
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-m", "d3tom_export", *map(str, arguments)],
        stdin=slave, stdout=slave if whole else subprocess.PIPE, stderr=slave, env=inherited | wanted,
        start_new_session=True, preexec_fn=_be_in_front,
    )  # fmt: skip
    os.close(slave)
    told = _read(master, interrupt_at and interrupt_at.encode())
    os.close(master)
    stdout, _ = process.communicate(timeout=60)
    return OnTerminal(process.returncode, told.decode(), (stdout or b"").decode())


def _be_in_front() -> None:
    """In the command's process: the terminal is its own, and so is what is typed there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read(master: int, until: bytes | None) -> bytes:
    """All that is written to the terminal; Ctrl-C is pressed behind ``until``."""
    told = b""
    while True:
        try:
            told += os.read(master, 1 << 16)
        except OSError:  # nobody has the other end any more
            return told
        if until is not None and until in told:
            os.write(master, b"\x03")
            until = None
