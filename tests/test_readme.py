"""The commands, targets and links of the README and the docs are real."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

from d3tom_export.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)]
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("d3tom-export ")])
def test_commands_parse(line: str) -> None:
    name, *arguments = shlex.split(re.sub(r" > \S+$", "", line))[1:]  # without what is the shell's
    with click.Context(main, **main.context_settings) as parent:
        command = main.get_command(parent, name)
        assert command is not None, name
        with click.Context(command, parent=parent, info_name=name) as context:
            command.parse_args(context, arguments)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {target for text in TEXTS.values() for target in re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)}
    assert {"demo", "test"} <= named
    for target in named:
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(#[^)]*)?\)", TEXTS[page])
    for target, _ in links:
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for picture in re.findall(r"--image (examples/\S+)", TEXTS[page]):
        assert (ROOT / picture).exists(), picture


@pytest.mark.parametrize(
    "module", [line for text in TEXTS.values() for line in re.findall(r"`python -m ([\w.]+)", text)]
)
def test_programs_exist(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert not re.findall(r"<!--|^[A-Z]{4,}$|\b(?:TODO|TBD|FIXME)\b", TEXTS[page], re.MULTILINE)
