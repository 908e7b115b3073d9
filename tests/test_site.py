"""The site of the docs: its reference is that of the commands, every page is in it, nothing comes from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import d3tom_export as d3
from docs import reference

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SETUP = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_the_reference_is_that_of_the_commands() -> None:
    made = reference.pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in reference.FOLDER.glob("*.md")}
    differing = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    assert not differing, f"docs/commands has other pages than the commands: {differing}. Run `make reference`."


def test_every_page_is_in_the_sites_contents() -> None:
    contents = re.findall(r"^ +- (?:[\w ]+: )?(\S+\.md)$", SETUP.partition("\nnav:\n")[2], re.MULTILINE)
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    lacking = sorted(pages - set(contents))
    assert not lacking, f"{lacking} are in no part of mkdocs.yml's nav"
    assert set(contents) - pages == {"index.md", "repository/SECURITY.md"}
    assert len(contents) == len(set(contents))


def test_every_name_of_the_api_is_in_its_reference() -> None:
    told = re.findall(r"^::: d3tom_export\.(\w+)$", (DOCS / "api_reference.md").read_text(), re.MULTILINE)
    assert sorted(told) == sorted(set(d3.__all__) - {"__version__"})


def test_text_of_help_is_no_markup() -> None:
    told = reference._text("Ratio l* of <image>, see --step-ratio\n and `a<b` [x_y]; -h, no-op, 1 - 2.")
    assert told == r"Ratio l\* of &lt;image&gt;, see `--step-ratio` and `a<b` \[x\_y\]; `-h`, no-op, 1 - 2."


class _Loaded(HTMLParser):
    """What a page loads as it is opened, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.found.append(given.get("src") or "")
        if tag == "link":
            self.found.append(given.get("href") or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed here: pip install "d3tom-export[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "excluded from the built site" not in done.stderr  # a link to nowhere, which is no warning to MkDocs
    site = tmp_path / "site"
    pages = {path.relative_to(site).as_posix(): _Loaded() for path in site.rglob("*.html")}
    for name, page in pages.items():
        page.feed((site / name).read_text(encoding="utf-8"))
        assert page.found, name
        assert not [each for each in page.found if re.match(r"(https?:)?//", each)], name
    wanted = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md")}
    wanted = {name.replace("README.html", "index.html") for name in wanted}
    assert {*wanted, "index.html", "repository/SECURITY.html"} <= pages.keys()
    assert "Two commands" in pages["index.html"].text
    told = pages["api_reference.html"].text
    assert all(name in told for name in ("answer_many", "picture_bytes", "mean_kept", "fill_after_end"))
    assert ":class:" not in told
    assert (site / "repository" / "d3tom_export" / "engines" / "stages.py").is_file()
