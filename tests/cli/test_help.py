"""Help that a person reads: every option under a heading, those that most people need first."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from d3tom_export.cli import common, main
from d3tom_export.cli.sections import MOST, MOST_USED, Section, apply_options, heading, section_of, under
from tests.conftest import Invoke

TITLES = [MOST_USED, *(section.value for section in Section)]


def _contexts(name: str) -> Iterator[click.Context]:
    with click.Context(main.main, **main.main.context_settings) as parent:
        command = main.main.get_command(parent, name)
        assert isinstance(command, common.Command), f"`{name}` is no common.Command: its help has no sections"
        with click.Context(command, parent=parent, info_name=name) as context:
            yield context


@pytest.fixture(params=list(main.COMMANDS))
def context(request: pytest.FixtureRequest) -> Iterator[click.Context]:
    """Of a command, for each of them."""
    yield from _contexts(request.param)


def _options(context: click.Context) -> list[click.Option]:
    return [each for each in context.command.params if isinstance(each, click.Option)]


def test_every_option_is_under_a_heading(context: click.Context) -> None:
    bare = [option.opts[0] for option in _options(context) if section_of(option) is None]
    assert not bare, f"no heading(Section...) stands above {', '.join(bare)} of `{context.info_name}`"


def test_the_options_that_most_people_need_come_first(context: click.Context) -> None:
    command = context.command
    assert isinstance(command, common.Command)
    own = [option for option in _options(context) if section_of(option) is not Section.HELP]
    titles = list(command.sections(context))
    assert len(command.first) <= MOST
    assert bool(command.first) == bool(own), f"`{context.info_name}` names no `first` options"
    assert not own or titles[0] == MOST_USED
    assert titles == [title for title in TITLES if title in titles]
    assert titles[-1] == Section.HELP.value


def test_help_shows_every_option_once(context: click.Context, invoke: Invoke) -> None:
    assert isinstance(context.command, common.Command)
    title = next(iter(context.command.sections(context)))
    shown = invoke(str(context.info_name), "--help").output.partition(f"\n{title}:\n")[2]
    flags = [flag for option in _options(context) for flag in (*option.opts, *option.secondary_opts)]
    terms = " ".join(re.findall(r"^  (-.+?)(?:  .*)?$", shown, re.MULTILINE))
    found = re.findall(r"(?<![\w-])--?[a-z][\w-]*", terms)
    assert sorted(found) == sorted([*flags, "-h", "--help"])
    assert not re.search(r"(INTEGER|FLOAT)( RANGE)?\b", shown)


def test_the_main_help_has_every_command_in_a_section(invoke: Invoke) -> None:
    shown = invoke("--help").output
    for title, commands in main.SECTIONS.items():
        (block,) = re.findall(rf"^{title}:\n((?:  .*\n)+)", shown, re.MULTILINE)
        told = " ".join(f"{name} {line}" for name, line in commands.items())
        assert block.split() == told.split()
    assert len(main.COMMANDS) == sum(map(len, main.SECTIONS.values()))


def test_a_heading_reaches_down_to_the_next_one_of_its_list() -> None:
    def stack(function: common.Any) -> common.Any:
        return apply_options(function, [click.option("--b"), heading(Section.MERGING), click.option("--c")])

    @click.command(cls=common.Command, first="c")
    @click.option("--none")
    @heading(Section.ENGINES)
    @click.option("--a")
    @stack
    @under(Section.LOOPS, click.option("--d"))
    @click.option("--e")
    @heading(Section.OUTPUT)
    @click.option("--f")
    def command() -> None:
        """Does nothing."""

    found = {option.opts[0]: section_of(option) for option in command.params}
    assert found == {
        "--none": None,
        "--a": Section.ENGINES,
        "--b": Section.ENGINES,
        "--c": Section.MERGING,
        "--d": Section.LOOPS,
        "--e": Section.ENGINES,
        "--f": Section.OUTPUT,
        "--debug": Section.HELP,
    }
    shown = {title: [option.opts[0] for option in options] for title, options in _shown(command).items()}
    assert shown[MOST_USED] == ["--c"]
    assert "--none" in shown[Section.HELP.value]  # shown all the same


def test_an_option_that_is_not_there_cannot_come_first() -> None:
    command = common.Command("name", first="nothing")
    with pytest.raises(KeyError, match="--nothing"):
        _shown(command)


def _shown(command: common.Command) -> dict[str, list[click.Option]]:
    with click.Context(command, **main.main.context_settings) as context:
        return command.sections(context)
