"""The README's commands and links are real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from d3tom_export.cli.main import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", TEXT, flags=re.DOTALL)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("d3tom-export ")])
def test_commands_parse(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    with click.Context(main) as parent:
        command = main.get_command(parent, name)
        assert command is not None, name
        with click.Context(command, parent=parent, info_name=name) as context:
            command.parse_args(context, arguments)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"make ([a-z]+)", TEXT))
    assert {"demo", "test"} <= named
    for target in named:
        assert f"\n{target}:" in makefile


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", TEXT) + re.findall(r"--image (examples/\S+)", TEXT)
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_nothing_is_left_to_fill_in() -> None:
    assert "<!--" not in TEXT
