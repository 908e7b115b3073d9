"""Writes ``docs/commands/``, the reference of the commands, from the commands: ``python -m docs.reference``."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from d3tom_export.cli import common
from d3tom_export.cli.main import COMMANDS, SECTIONS, main

FOLDER = Path(__file__).parent / "commands"
_SPECIAL = re.compile(r"([\\*_\[\]])")
_CODE = re.compile(r"(`[^`]+`|(?<![\w-])--?[a-z][\w-]*)")
"""Of a text of help: what is code in it, in backticks or as an option."""


def pages() -> dict[str, str]:
    """The pages by the names of their files."""
    with click.Context(main, **main.context_settings) as parent:
        made = {"README.md": _overview()}
        for name in COMMANDS:
            command = main.get_command(parent, name)
            assert isinstance(command, common.Command), name
            with click.Context(command, parent=parent, info_name=name) as context:
                made[f"{name}.md"] = "\n".join(_page(command, context)) + "\n"
    return made


def _overview() -> str:
    lines = [
        "# Commands",
        "",
        "What `d3tom-export COMMAND --help` says, written from the commands by `make reference`. The options that most "
        "people need come first. Exit codes: 0 done and passed, 1 failed or did not pass, 2 called wrongly.",
        "",
        "| | command | |",
        "| --- | --- | --- |",
    ]
    for title, commands in SECTIONS.items():
        for number, (name, line) in enumerate(commands.items()):
            lines.append(f"| {'' if number else title} | [`{name}`]({name}.md) | {_text(line)} |")
    return "\n".join(lines) + "\n"


def _page(command: common.Command, context: click.Context) -> Iterator[str]:
    name = str(context.info_name)
    usage = " ".join(["d3tom-export", name, *command.collect_usage_pieces(context)])
    yield from (f"# {name}", "", f"    {usage}", "")
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b"):
            yield from ("```console", *paragraph.splitlines()[1:], "```", "")
        else:
            yield from (_text(" ".join(paragraph.splitlines())), "")
    for title, options in command.sections(context).items():
        yield from (f"## {title}", "")
        for option in options:
            term, text = option.get_help_record(context) or ("", "")
            yield f"* `{term}`<br>{_text(text)}"
        yield ""
    yield "[All commands](README.md)"


def _text(text: str) -> str:
    """A text of help as Markdown: options as code, and nothing taken for markup."""
    parts = _CODE.split(re.sub(r"\s+", " ", text).strip())
    return "".join(
        (part if part.startswith("`") else f"`{part}`") if number % 2 else _plain(part)
        for number, part in enumerate(parts)
    )


def _plain(text: str) -> str:
    return html.escape(_SPECIAL.sub(r"\\\1", text), quote=False)  # Python's Markdown knows no escape of <


def write() -> None:
    """Bring the folder up to date."""
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
