"""What the commands share: how errors, progress and machine-readable results reach the user."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from d3tom_export.errors import CallError, D3tomError, printable

from .sections import NUMBERS, Section, put_under, sections, under

if TYPE_CHECKING:
    from d3tom_export.bundle.folder import Bundle
    from d3tom_export.checkpoint.folder import Checkpoint
    from d3tom_export.quantize.summary import WeightsSummary

_SAME_END = 2.0
"""Seconds within which further signals are taken for the first one's: a terminal that closes sends several."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a terminated command, or one whose terminal is closed, clean up after itself as an interrupted one does.

    Signals that are ignored stay ignored (``nohup``). Only the main thread may say so.
    """
    ended = -math.inf

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ended
        if time.monotonic() - ended > _SAME_END:
            ended = time.monotonic()
            signal.default_int_handler(number, frame)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_TERM = 30
"""Characters of the column of options, beyond which click breaks the line."""


class Command(click.Command):
    """A command with ``--debug`` that turns failures into one paragraph and exit code 1, and help in sections.

    ``first`` names the options that most people need, by their flags without dashes: help shows them first, in that
    order.
    """

    def __init__(self, *args: Any, first: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        debug = click.Option(
            ["--debug"], is_flag=True, expose_value=False, callback=self._keep, help="Show error traces."
        )
        put_under(debug, Section.HELP)
        self.params.append(debug)
        self.first = first.split()
        for option in self.params:
            option.metavar = option.metavar or NUMBERS.get(option.type.name)

    def sections(self, ctx: click.Context) -> dict[str, list[click.Option]]:
        """The options that help shows, by the titles of their sections."""
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option) and not each.hidden]
        return sections(options, self.first)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, options in self.sections(ctx).items():
            with formatter.section(title):
                records = [record for option in options if (record := option.get_help_record(ctx))]
                formatter.write_dl([(f"{term:<{_TERM}}", text) for term, text in records])  # all in one column

    @staticmethod
    def _keep(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta["d3tom_export.debug"] = value

    def invoke(self, ctx: click.Context) -> Any:
        with _ended_by_signals():
            try:
                return self._invoke(ctx)
            finally:
                ConsoleProgress.close()

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if isinstance(error, CallError):
                raise click.UsageError(str(error), ctx) from None
            if ctx.meta.get("d3tom_export.debug"):
                raise
            raise click.ClickException(_paragraph(ctx.info_name, error)) from None


def _paragraph(command: str | None, error: Exception) -> str:
    """What a failure says to a user, and what to do next."""
    if isinstance(error, D3tomError):
        return str(error)
    if isinstance(error, ImportError):
        return (
            f"`{command}` needs a package that is not installed here: {error}. "
            'Building and the PyTorch oracle need `pip install "d3tom-export[build]"`; '
            "`d3tom-export doctor` lists what is missing."
        )
    if isinstance(error, OSError):
        return system_paragraph(command, error)
    return (
        f"`{command}` stopped on an unexpected {type(error).__name__}: {error}. "
        "This is a defect of d3tom-export; please report it with the trace that --debug shows."
    )


def system_paragraph(command: str | None, error: OSError) -> str:
    """What an error of the system says to a user."""
    return printable(
        f"`{command}` was stopped by the system: {error}. Check the path, its permissions and free space, and where "
        "the output goes."
    )


class ConsoleProgress:
    """Shows library progress on standard error: a bar on a terminal, timed lines elsewhere."""

    _BAR = 24
    _open = False
    """Whether a bar's line is still open, which an error must not continue."""

    @classmethod
    def close(cls) -> None:
        """End an open bar's line."""
        if cls._open:
            click.echo(err=True)
            cls._open = False

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.terminal = sys.stderr.isatty()
        self._last_line = ""

    def seconds(self) -> float:
        """Since this was made: what all lines are timed by."""
        return time.perf_counter() - self._started

    def __call__(self, what: str, done: int, total: int) -> None:
        seconds = self.seconds()
        if self.terminal:
            filled = self._BAR * done // max(total, 1)
            bar = "█" * filled + "·" * (self._BAR - filled)
            click.echo(f"\r\033[K{bar} {done}/{total} {what} ({seconds:.1f} s)", nl=done >= total, err=True)
            ConsoleProgress._open = done < total
        elif what != self._last_line:
            click.echo(f"[{seconds:7.2f} s] {what} ({done}/{total})", err=True)
        self._last_line = what


class TimeLeft:
    """A library's progress with the time that is left: on a terminal at every part, elsewhere now and then.

    Parts that were done before it was first called, in an earlier run, took no time of this one. With ``parts``, what
    they are called, it tells how many are done a second, too.
    """

    _EVERY = 15.0
    """Seconds between lines that are no terminal's."""

    def __init__(self, progress: ConsoleProgress, parts: str = "") -> None:
        self._progress, self._parts = progress, parts
        self._first: tuple[float, int] | None = None
        self._total = 0
        self._line = -math.inf

    def __call__(self, what: str, done: int, total: int) -> None:
        now = self._progress.seconds()
        if self._first is None or total != self._total:
            self._first, self._total = (now, done), total
        started, before = self._first
        if done >= total:
            self._progress(f"{what}: done", done, total)
        elif self._progress.terminal or now - self._line >= self._EVERY:
            left = ""
            if done > before and now > started:
                each = (now - started) / (done - before)
                rate = f", {1 / each:.3g} {self._parts} a second" if self._parts else ""
                left = f"{rate}, {_duration(each * (total - done))} left"
            # A line for every call that comes through: no two say the same time.
            self._progress(f"{what}{left}", done, total)
            self._line = now


def _duration(seconds: float) -> str:
    """Seconds in words, in the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def json_option(function: Any) -> Any:
    """``--json FILE``, ``-`` for standard output."""
    option = click.option(
        "json_file",
        "--json",
        type=click.Path(dir_okay=False, allow_dash=True),
        metavar="FILE",
        help="Write the result as JSON to FILE; - for standard output, where nothing else is printed then.",
    )
    return under(Section.OUTPUT, option)(function)


def write_json(json_file: str | None, result: dict[str, Any]) -> None:
    """Write ``result`` where ``--json`` asked for it."""
    if json_file is None:
        return
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if json_file == "-":
        if sys.stdout is None:
            raise D3tomError("Standard output is closed: `--json -` has nowhere to write. Give --json a file.")
        click.echo(text, nl=False)
        return
    write_output(Path(json_file), text.encode(), "--json")


def write_output(path: Path, content: bytes, option: str) -> None:
    """Write a result where ``option`` asked for it, whole or not at all; a pipe or a device is written into.

    Raises :class:`D3tomError` where that cannot be, or where ``path`` is a link of somebody else's.
    """
    from d3tom_export.trust.replace import replace_file

    try:
        _refuse_links_of_others(path, option)
        path = path.resolve()
        if path.exists() and not path.is_file():  # a pipe or a device: there is nothing to replace
            path.write_bytes(content)
        else:
            replace_file(path, content)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise D3tomError(f"The result cannot be written to {path}: {error}. Give {option} another path.") from None


def check_writable(path: Path, option: str) -> None:
    """Refuse a path that :func:`write_output` could not write, before there is anything to write."""
    _refuse_links_of_others(path, option)
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe or a device
        return
    folder = path.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        found = "no folder that may be written into" if folder.is_dir() else "no folder"
        raise D3tomError(f"The result cannot be written to {path}: {folder} is {found}. Give {option} another path.")


def _refuse_links_of_others(path: Path, option: str) -> None:
    """A link that somebody else laid into a shared folder is no wish of ours: as the kernel sees it, so do we."""
    for _ in range(40):
        if not path.is_symlink():
            return
        owner = path.lstat().st_uid
        if owner not in (os.geteuid(), path.parent.stat().st_uid):
            raise D3tomError(
                f"{path} is a link of another user (number {owner}): the result is not written where it leads. Give "
                f"{option} another path."
            )
        path = path.parent / path.readlink()


def say(json_file: str | None, text: str) -> None:
    """Print for people: to standard output, or to standard error where that carries the JSON."""
    click.echo(text, err=json_file == "-")


def tell_notes(checkpoint: Checkpoint) -> None:
    """Say on standard error how a checkpoint was read, where that is not as it stands."""
    for note in checkpoint.notes:
        click.echo(printable(note), err=True)


def note(sentence: str) -> None:
    """Say what users should know while the work goes on."""
    click.echo(f"Note: {printable(sentence)}", err=True)


def weights_of(bundle: Bundle) -> WeightsSummary | None:
    """What the headers of the weight files say of weights in few bits; None where there are none."""
    if not bundle.manifest.formats:
        return None
    from d3tom_export.checkpoint.folder import open_checkpoint
    from d3tom_export.quantize.summary import summary_of

    return summary_of(open_checkpoint(bundle.folder, vocab_rows=bundle.manifest.vocab_rows))


def warn_of_random_weights(bundle: Bundle) -> None:
    """Say on standard error where a bundle's weights are not a trained model's."""
    if bundle.manifest.weights_note:
        note(bundle.manifest.weights_note)
