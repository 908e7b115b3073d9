"""How ``--help`` is laid out: the options that most people need first, the others under headings by purpose.

Click has no sections of options, and packages that add them take longer to import than help may take, or replace every
decorator: a heading above the options that it is of, and the printing of them, are all that is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

MOST_USED = "Most used options"
"""The first section's title."""

MOST = 10
"""Options of the first section."""

NUMBERS = {"integer": "N", "integer range": "N", "float range": "X"}
"""What stands for a number in help, by click's name of its type; its range stands behind the explanation."""


class Section(Enum):
    """Headings, in the order in which help shows them."""

    SOURCE = "Models and bundles"
    SERVING = "Server and its limits"
    ASKING = "Questions and pictures"
    SEARCH = "What is searched for"
    SCORING = "When an answer is right"
    MEASURING = "What is measured"
    SIZES = "Sizes that are counted"
    MERGING = "Merging"
    LOOPS = "Loops and the KV cache"
    QUANTIZATION = "Precision and quantization"
    ENGINES = "Engines"
    RUNTIME = "Runtime and device"
    LENGTH = "Length and steps of an answer"
    COMMITTING = "Tokens that a step commits"
    SAMPLING = "Choice of tokens"
    CHECKS = "Checks and limits"
    OUTPUT = "Output"
    HELP = "Help and errors"


_ATTRIBUTE = "d3tom_section"
"""Of an option: its :class:`Section`."""
_PARAMETERS = "__click_params__"
"""Where click's decorators collect options on a function, last one first, until it becomes a command."""


def heading(section: Section) -> Callable[[F], F]:
    """A line above options in a list of decorators: those below it are of ``section``, down to the next such line.

    A stack among them (:func:`apply_options`) with headings of its own keeps them, and hers reach no further.
    """

    def mark(function: F) -> F:
        for parameter in getattr(function, _PARAMETERS, ()):
            if section_of(parameter) is None:
                put_under(parameter, section)
        return function

    return mark


def apply_options(function: F, options: Sequence[Callable[[Any], Any]]) -> F:
    """``function`` with ``options``, which ``--help`` shows in their order."""

    def stack() -> None:
        """Collects them: so headings among them are for them alone."""

    for option in reversed(options):
        option(stack)
    setattr(function, _PARAMETERS, [*getattr(function, _PARAMETERS, ()), *getattr(stack, _PARAMETERS, ())])
    return function


def under(section: Section, option: Callable[[Any], Any]) -> Callable[[F], F]:
    """``option``, which several commands take, with its heading."""
    return partial(apply_options, options=[heading(section), option])


def put_under(parameter: click.Parameter, section: Section) -> None:
    """Say which section an option is of."""
    setattr(parameter, _ATTRIBUTE, section)


def section_of(parameter: click.Parameter) -> Section | None:
    """The section of an option; None where no heading stood above it."""
    found: Section | None = getattr(parameter, _ATTRIBUTE, None)
    return found


def sections(options: Sequence[click.Option], first: Sequence[str]) -> dict[str, list[click.Option]]:
    """``options`` by the titles of their sections: the ones named ``first``, in that order, then the others.

    ``first`` are flags without dashes in front. An option without a section stands in the last one, so that help shows
    every option; a test says which those are.
    """
    flags = {flag: option for option in options for flag in option.opts}
    leading = [flags[f"--{name}"] for name in first]
    found = {MOST_USED: leading, **{section.value: [] for section in Section}}
    for option in options:
        if option not in leading:
            found[(section_of(option) or Section.HELP).value].append(option)
    return {title: listed for title, listed in found.items() if listed}
